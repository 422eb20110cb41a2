"""The rule of pacing: which of the drafted tokens are worth verifying, given what a step costs.

One rule, for one sequence or hundreds. Let T(d) be the time of a step that verifies d draft tokens of S sequences, and
p the probabilities of all drafted tokens, likeliest first. Verify the first k, for the k that maximises

    p[0] + ... + p[k-1] - g x S x (T(k) / T(0) - 1)

that is, the tokens that the draft is expected to commit, less those that its time would commit otherwise: g is the
ratio of the tokens a second to those of plain steps, 1 or more. With the running ratio this maximises tokens over time
in the long run, were each step's drafts independent of the last one's (Dinkelbach 1967, "On nonlinear fractional
programming"). But good drafts come in a row, in a copy, where the time saved by one more token is that of a cheap step;
and where drafts are poor, a token saves nearly a whole plain step. So g is the geometric mean of the running ratio and
the best that this step alone could have, what a tree costs more left out; where all or nothing is verified, it is the
running ratio. A token's probability includes its ancestors', so the likeliest first are always whole beginnings of
drafts. Where nothing pays, k is 0.

Where the forward pass takes as many tokens for every sequence as for the one with the longest draft, the rule chooses
that number, w: the w likeliest tokens of each draft are verified, and the step verifies S x w.
"""

from __future__ import annotations

import math

import numpy as np

from freedraft.plugins.step_time import interpolate
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Bool, Float32, Float64, Int32, Int64, UInt8


@kernel
def never_rising(probability: Float32, parents: Int32, offsets: Int64) -> Float32:
    """The probabilities, none above its parent's and none NaN, whatever a drafter says."""
    sound = np.empty(len(probability), np.float32)
    for row in range(len(offsets) - 1):
        for i in range(offsets[row], offsets[row + 1]):
            most = 1.0 if parents[i] < 0 else sound[offsets[row] + parents[i]]
            sound[i] = min(probability[i], most) if probability[i] > 0.0 else 0.0
    return sound


@kernel
def expected_by_number(probability: Float32) -> Float64:
    """The tokens that the k + 1 likeliest of all are expected to commit; float64 `(t,)`."""
    return np.cumsum(np.sort(probability)[::-1].astype(np.float64))


@kernel
def expected_by_width(probability: Float32, offsets: Int64) -> Float64:
    """The tokens that the k + 1 likeliest of each row are expected to commit; float64, as long as the longest row."""
    expected = np.zeros(np.max(np.diff(offsets)))
    for row in range(len(offsets) - 1):
        ordered = np.sort(probability[offsets[row] : offsets[row + 1]])
        for j in range(len(ordered)):
            expected[j] += ordered[len(ordered) - 1 - j]
    return np.cumsum(expected)


@kernel
def best_ratio(expected: Float64, more: int, sequences: int, plain: float, grid: Int64, shape: Float64) -> float:
    """The most tokens a second that a step could have, as a multiple of a plain step's; 1 at least.

    Args: as of `best_number`.
    """
    most = 1.0
    for k in range(1, len(expected) + 1):
        cost = interpolate(grid, shape, sequences + k * more) / plain
        most = max(most, (1.0 + expected[k - 1] / sequences) / cost)
    return most


@kernel
def best_number(
    expected: Float64, more: int, sequences: int, plain: float, grid: Int64, shape: Float64, gain: float
) -> tuple[int, float]:
    """The k from 1 up that brings most, by the rule above.

    Args:
        expected: float64, the tokens that 1, 2, ... are expected to commit: of all, or of each row in padded passes.
        more: draft tokens that the pass takes for each of these: 1, or S in padded passes.
        sequences: S.
        plain, grid, shape: T; see `StepTime.knots`.
        gain: g.

    Returns:
        k, and the tokens that it brings beyond those that its time is worth.
    """
    price = gain * sequences / plain
    best, most = 1, -np.inf
    for k in range(1, len(expected) + 1):
        surplus = expected[k - 1] - price * interpolate(grid, shape, sequences + k * more)
        if surplus > most:
            best, most = k, surplus
    return best, most + gain * sequences


@kernel
def likeliest(probability: Float32, keep: int) -> Bool:
    """Mark the `keep` likeliest, of equals the first: bool `(t,)`."""
    if keep >= len(probability):
        return np.ones(len(probability), np.bool_)
    threshold = np.sort(probability)[len(probability) - keep]
    marks = probability > threshold
    equals = keep - marks.sum()
    for i in range(len(probability)):
        if equals and probability[i] == threshold:
            marks[i] = True
            equals -= 1
    return marks


@kernel
def likeliest_of_each(probability: Float32, offsets: Int64, keep: int) -> Bool:
    """Mark the `keep` likeliest of each row, of equals the first: bool `(t,)`."""
    marks = np.empty(len(probability), np.bool_)
    for row in range(len(offsets) - 1):
        marks[offsets[row] : offsets[row + 1]] = likeliest(probability[offsets[row] : offsets[row + 1]], keep)
    return marks


@kernel
def best_part(
    probability: Float32,
    parents: Int32,
    offsets: Int64,
    trust: float,
    padded: bool,
    sequences: int,
    plain: float,
    grid: Int64,
    shape: Float64,
    gain: float,
    final: bool,
) -> tuple[Bool, float, float, float, float, bool, float]:
    """What is worth verifying, by the rule above, of drafts that are not empty.

    Args:
        probability, parents, offsets: as in `Drafts`, none above its parent's.
        trust: what the probabilities are worth, as a share of what they say.
        padded: the pass takes as many tokens for every sequence as for the one with the longest draft.
        sequences: S.
        plain, grid, shape: T; see `StepTime.knots`.
        gain: g if `final`, else the running ratio, which g follows from.

    Returns:
        bool `(t,)`, the tokens; how many of them are expected to be accepted; the highest probability of the others, as
        it was told, 0 where there are none; what they bring beyond what their time is worth; that time, as a multiple
        of a step without a draft; whether they are more than a chain in any row, which is not in the time; and g.
    """
    more = sequences if padded else 1
    expected = trust * (expected_by_width(probability, offsets) if padded else expected_by_number(probability))
    if not final:
        gain = math.sqrt(gain * best_ratio(expected, more, sequences, plain, grid, shape))
    number, surplus = best_number(expected, more, sequences, plain, grid, shape, gain)
    marks = likeliest_of_each(probability, offsets, number) if padded else likeliest(probability, number)
    left_out = 0.0
    for i in range(len(marks)):
        if not marks[i]:
            left_out = max(left_out, probability[i])
    cost = interpolate(grid, shape, sequences + number * more) / plain
    return marks, expected[number - 1], left_out, surplus, cost, is_tree(parents, offsets, marks), gain


@kernel
def keep_marked(
    tokens: Int32, parents: Int32, probability: Float32, source: UInt8, offsets: Int64, marks: Bool
) -> tuple[Int32, Int32, Float32, UInt8, Int64]:
    """The nodes that are marked, among them the parent of each; the parts of `Drafts`.

    The likeliest are such nodes: one is never likelier than its parent, and comes after it.
    """
    keep = marks.sum()
    kept_tokens, kept_parents = np.empty(keep, np.int32), np.empty(keep, np.int32)
    kept_probability, kept_source = np.empty(keep, np.float32), np.empty(keep, np.uint8)
    kept_offsets = np.zeros(len(offsets), np.int64)
    place = np.empty(len(tokens), np.int32)
    used = 0
    for row in range(len(offsets) - 1):
        start = used
        for i in range(offsets[row], offsets[row + 1]):
            if not marks[i]:
                continue
            place[i] = used - start
            kept_tokens[used], kept_probability[used], kept_source[used] = tokens[i], probability[i], source[i]
            kept_parents[used] = -1 if parents[i] < 0 else place[offsets[row] + parents[i]]
            used += 1
        kept_offsets[row + 1] = used
    return kept_tokens, kept_parents, kept_probability, kept_source, kept_offsets


@kernel
def is_tree(parents: Int32, offsets: Int64, marks: Bool) -> bool:
    """Whether the marked nodes of any row are more than a chain.

    Args:
        parents: int32 `(t,)`, as in `Drafts`.
        offsets: int64 `(n + 1,)`.
        marks: bool `(t,)`, on the parent of each node that is marked, too.
    """
    for row in range(len(offsets) - 1):
        last = -1
        for i in range(offsets[row], offsets[row + 1]):
            if marks[i]:
                if parents[i] != last:
                    return True
                last = i - offsets[row]
    return False

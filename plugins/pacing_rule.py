"""The rule of pacing: which of the drafted tokens are worth verifying, given what a step costs.

One rule, for one sequence or hundreds. Let T(d) be the time of a step that verifies d draft tokens of S sequences, and
p the probabilities of all drafted tokens, likeliest first. Verify the first k, for the k that maximises

    p[0] + ... + p[k-1] - g x S x (T(k) / T(0) - 1)

that is, the tokens that the draft is expected to commit, less those that its time would commit otherwise: g is the
running ratio of the tokens a second to those of plain steps, 1 or more. This maximises tokens over time in the long run
(Dinkelbach 1967, "On nonlinear fractional programming"), where the best ratio of each single step would spend too much
on poor drafts. A token's probability includes its ancestors', so the likeliest first are always whole beginnings of
drafts. Where nothing pays, k is 0.

Where the forward pass takes as many tokens for every sequence as for the one with the longest draft, the rule chooses
that number, w: the w likeliest tokens of each draft are verified, and the step verifies S x w.
"""

from __future__ import annotations

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
def best_prefix(
    probability: Float32, sequences: int, plain: float, grid: Int64, shape: Float64, gain: float
) -> tuple[int, float]:
    """The k from 1 up whose k likeliest tokens bring most, by the rule above.

    Args:
        probability: float32 `(t,)`.
        sequences: S.
        plain, grid, shape: T; see `StepTime.knots`.
        gain: g.

    Returns:
        k, and the tokens that it brings beyond those that its time is worth.
    """
    ordered = np.sort(probability)
    total = len(ordered)
    last = len(grid) - 1
    price = gain * sequences / plain
    expected = 0.0
    best, most = total, -np.inf
    at = 0
    for k in range(1, total + 1):
        expected += ordered[total - k]
        tokens = sequences + k
        while at < last and grid[at + 1] <= tokens:
            at += 1
        if at == last:
            time = shape[last] * tokens / grid[last]
        else:
            share = (tokens - grid[at]) / (grid[at + 1] - grid[at])
            time = shape[at] + share * (shape[at + 1] - shape[at])
        surplus = expected - price * time
        if surplus > most:
            best, most = k, surplus
    return best, most + gain * sequences


@kernel
def best_width(
    probability: Float32, offsets: Int64, sequences: int, plain: float, grid: Int64, shape: Float64, gain: float
) -> tuple[int, float]:
    """The w from 1 up so that the w likeliest tokens of each draft bring most, by the rule above for padded passes.

    Args: as of `best_prefix`; `offsets` is int64 `(n + 1,)`.

    Returns:
        w, and the tokens that it brings beyond those that its time is worth.
    """
    expected = np.zeros(np.max(np.diff(offsets)))
    for row in range(len(offsets) - 1):
        ordered = np.sort(probability[offsets[row] : offsets[row + 1]])
        for j in range(len(ordered)):
            expected[j] += ordered[len(ordered) - 1 - j]
    price = gain * sequences / plain
    best, most, total = 1, -np.inf, 0.0
    for width in range(1, len(expected) + 1):
        total += expected[width - 1]
        surplus = total - price * interpolate(grid, shape, sequences * (1 + width))
        if surplus > most:
            best, most = width, surplus
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

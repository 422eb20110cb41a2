"""What fusion keeps of a sequence to learn from what is committed, and how far it is trusted.

The mixer is one for all sequences, but some are more predictable than it thinks, and others less: a patch copies, a
story does not, however alike their contexts look. So each has a bias of its own, learnt while it is written.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins.evidence import KIND, KINDS, LIKELIEST, RANKED
from freedraft.plugins.mixing import Candidates, Mixer, learn_correction, likeliest, squash, stretch
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Float64, Int32, Int64, UInt8

NOT_STARTED = -1
ROOT = -1
NOT_DRAFTED = -2
BIAS_RATE = 0.05
MOST_LEARNT = 128
"""Of a step that goes on with more replies than this, the mixer learns from about so many: hundreds show enough."""
APART = 104729
"""A prime, so that the turns of one slot and the next are not the same."""
SCATTER = 40503
"""2**16 by the golden ratio: multiples of it, modulo 2**16, are spread evenly."""
LEAST = 1e-4
"""A probability is held to be no nearer to 0 or 1 than this before its bias is added."""


class Judged(NamedTuple):
    """What fusion keeps for each slot, beside its texts, to learn from what is committed.

    Attributes:
        started: int64 `(slots,)`, the length at the first draft: there the reply begins. `NOT_STARTED` until then.
        owner: int64 `(slots,)`, of the entries of shared tables that the sequence reads and writes.
        last: int64 `(slots,)`, the token committed last; `NO_TOKEN` in an empty text.
        considered: int64 `(slots,)`, tokens considered in the last draft, the one that ended it included.
        tokens: int32 `(slots, longest + 1)`, these.
        parents: int32 `(slots, longest + 1)`, which of them each follows; -1 = the committed text.
        mixed: float32 `(slots, longest + 1)`, their probabilities before the last stage.
        kinds: uint8 `(slots, longest + 1)`, the kind of text that suggests each, see `kind_of`.
        bias: float64 `(slots, KINDS)`, see `trusted`.
        run: int64 `(slots,)`, tokens up to the end that were foreseen, in a row.
        drafted_run: int64 `(slots,)`, the same when the last draft was made.
    """

    started: Int64
    owner: Int64
    last: Int64
    considered: Int64
    tokens: Int32
    parents: Int32
    mixed: Float32
    kinds: UInt8
    bias: Float64
    run: Int64
    drafted_run: Int64


def nothing_judged(longest: int) -> Judged:
    """Room for no sequence, with drafts of up to `longest` tokens."""
    return Judged(
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros((0, longest + 1), np.int32),
        np.zeros((0, longest + 1), np.int32),
        np.zeros((0, longest + 1), np.float32),
        np.zeros((0, longest + 1), np.uint8),
        np.zeros((0, KINDS), np.float64),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
    )


@kernel
def kind_of(evidence: Int64, rows: int, token: int) -> int:
    """The kind of text that is first to hold a token the likeliest; a candidate that none does is of the rankings."""
    for i in range(rows):
        if evidence[i, LIKELIEST] == token:
            return int(evidence[i, KIND])
    return RANKED


@kernel
def begin_reply(judged: Judged, slot: int, length: int) -> None:
    """The reply begins at this length, and nothing is known of it."""
    judged.started[slot] = length
    judged.bias[slot] = 0.0
    judged.run[slot] = 0


@kernel
def replies_among(judged: Judged, slots: Int64) -> int:
    """In how many of these sequences a reply has begun."""
    replies = 0
    for slot in slots:
        replies += judged.started[slot] != NOT_STARTED
    return replies


@kernel
def is_learnt_from(slot: int, length: int, replies: int) -> bool:
    """Whether the mixer learns from a sequence of this length now, in a step that goes on with so many replies.

    Of more than `MOST_LEARNT` a part is, in turns that look random.
    """
    scattered = ((np.int64(length) + APART * slot) * SCATTER) & 0xFFFF
    return bool(scattered * replies < MOST_LEARNT << 16)


@kernel
def trusted(judged: Judged, slot: int, kind: int, mixed: float) -> float:
    """What a mixed probability is worth in this sequence, for a token that this kind of text suggests."""
    return squash(stretch(min(max(mixed, LEAST), 1.0 - LEAST)) + judged.bias[slot, kind])


@kernel
def foreseen(
    judged: Judged, slot: int, evidence: Int64, rows: int, candidates: Candidates, found: int, token: int
) -> None:
    """Take in whether the likeliest candidate, if there is any, was the token that was committed."""
    if found == 0:
        judged.run[slot] = 0
        return
    best = likeliest(candidates, found)
    kind = kind_of(evidence, rows, candidates.tokens[best])
    worth = trusted(judged, slot, kind, candidates.mixed[best])
    take_in_foreseen(judged, slot, kind, worth, candidates.tokens[best] == token)


@kernel
def take_in_foreseen(judged: Judged, slot: int, kind: int, worth: float, right: bool) -> None:
    """Take in whether a token that was the likeliest, with this probability, was right."""
    judged.bias[slot, kind] += BIAS_RATE * ((1.0 if right else 0.0) - worth)
    judged.run[slot] = judged.run[slot] + 1 if right else 0


@kernel
def foreseen_in_draft(judged: Judged, slot: int, node: int, token: int) -> bool:
    """As `foreseen`, by what the last draft took for the likeliest behind a node; False where it did not look."""
    best = NOT_DRAFTED
    for child in range(max(0, node), judged.considered[slot]):
        behind = judged.parents[slot, child] == node
        if behind and (best == NOT_DRAFTED or judged.mixed[slot, child] > judged.mixed[slot, best]):
            best = child
    if best == NOT_DRAFTED:
        return False
    right = judged.tokens[slot, best] == token
    take_in_foreseen(judged, slot, judged.kinds[slot, best], judged.mixed[slot, best], right)
    return True


@kernel
def judge(mixer: Mixer, judged: Judged, slot: int, depth: int, node: int, token: int) -> int:
    """Tell the last stage which tokens behind a node of the last draft were right; return the one that was.

    Args:
        depth: tokens of the draft up to and including `node`.
        node: that was committed, `ROOT` at first.
        token: that was committed behind it.

    Returns:
        `NOT_DRAFTED` where none was right.
    """
    right = NOT_DRAFTED
    for child in range(max(0, node), judged.considered[slot]):
        if judged.parents[slot, child] == node:
            hit = judged.tokens[slot, child] == token
            learn_correction(mixer, judged.drafted_run[slot] + depth, judged.mixed[slot, child], hit)
            if hit:
                right = child
    return right

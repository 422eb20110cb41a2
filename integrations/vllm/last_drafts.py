"""Each sequence's last draft, kept until its outcome is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.integrations.vllm.statistics import Statistics
from freedraft.plugins.base import Drafts
from freedraft.retrieval.borrowing import borrowed
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.lending import Lent
from freedraft.retrieval.ragged import Float32, Int32, Int64, UInt8


class Notes(NamedTuple):
    """What is kept of each sequence's last draft; arrays of shape `(sequences,)` or `(sequences, longest)`.

    Attributes:
        given: int64, tokens that the runtime was given to verify.
        filled: int64, tokens besides that it was given to fill the draft up; they are no draft.
        asked: int64, nodes that the drafter had drafted, of which those given are some.
        source: uint8, of each token given.
        probability: float32, of each token given.
        node: int32, which node of the draft it was.
    """

    given: Int64
    filled: Int64
    asked: Int64
    source: UInt8
    probability: Float32
    node: Int32


class Kept(NamedTuple):
    """The notes, and where it is counted what became of them: int64 by source, tokens drafted and accepted."""

    notes: Notes
    drafted: Int64
    accepted: Int64


class Verified(NamedTuple):
    """The drafts of the last step that have been verified since, n of them.

    Attributes:
        sequences: int64 `(n,)`.
        accepted: int32 `(n,)`, tokens accepted of each.
        probability: float32 `(t,)`, of the tokens of all drafts.
        offsets: int64 `(n + 1,)`, where each draft begins in it.
    """

    sequences: Int64
    accepted: Int32
    probability: Float32
    offsets: Int64


class LastDrafts:
    """Remembers the drafts of a step, and counts them and what was accepted of them in `Statistics`.

    Args:
        sequences: room for so many.
        longest: tokens of a draft, at most.
        statistics: where to count.
    """

    def __init__(self, sequences: int, longest: int, statistics: Statistics) -> None:
        self.notes = Notes(
            np.zeros(sequences, np.int64),
            np.zeros(sequences, np.int64),
            np.zeros(sequences, np.int64),
            np.zeros((sequences, longest), np.uint8),
            np.zeros((sequences, longest), np.float32),
            np.zeros((sequences, longest), np.int32),
        )
        self._kept = _lend(Kept(self.notes, statistics.drafted, statistics.accepted))

    def note(self, sequences: Int64, given: Drafts, asked: Int64, nodes: Int32, chains: Int64, length: int = 0) -> None:
        """Remember a draft for each of `sequences`, and none for any other.

        Args:
            sequences: int64 `(n,)`.
            given: the chains that the runtime gets, each the beginning of one in `chains`.
            asked: int64 `(n + 1,)`, offsets of what was drafted.
            nodes: int32, for each token of the chains before they were cut, the node that it was in its row.
            chains: int64 `(n + 1,)`, offsets of these.
            length: shorter drafts are filled up to so many tokens.
        """
        _note(
            self._kept, sequences, given.source, given.probability, given.offsets, asked, nodes, chains, length
        )  # fmt: skip

    def settle(self, sequences: Int64, previous: Int64, length: Int32, new: Int64) -> Verified:
        """Find out what became of the drafts of the last step.

        A step commits the accepted tokens and one more. Where calls were skipped in between nobody knows.

        Args:
            sequences: int64 `(rows,)`, -1 = none.
            previous: int64 `(rows,)`, each row's length in the last call.
            length: int32 `(rows or more,)`, its length now.
            new: int64 `(rows,)`, tokens of the last step.
        """
        return Verified(*_settle(self._kept, sequences, previous, length, new))


@kernel
def _lend(kept: Kept) -> Lent[Kept]:
    return Lent(kept)


@kernel
def _settle(
    kept: Lent[Kept], sequences: Int64, previous: Int64, length: Int32, new: Int64
) -> tuple[Int64, Int32, Float32, Int64]:
    lent = borrowed(kept.arrays)
    notes, accepted_of = lent.notes, lent.accepted
    rows = len(sequences)
    who = np.empty(rows, np.int64)
    accepted = np.empty(rows, np.int32)
    offsets = np.zeros(rows + 1, np.int64)
    count = 0
    for i in range(rows):
        sequence = sequences[i]
        if sequence < 0 or notes.given[sequence] == 0 or new[i] == 0:
            continue
        if previous[i] == 0 or previous[i] + new[i] != length[i]:
            continue
        who[count] = sequence
        accepted[count] = min(new[i] - 1, notes.given[sequence])
        offsets[count + 1] = offsets[count] + notes.given[sequence]
        for j in range(accepted[count]):
            accepted_of[notes.source[sequence, j]] += 1
        count += 1
    probability = np.empty(offsets[count], np.float32)
    for i in range(count):
        for j in range(offsets[i + 1] - offsets[i]):
            probability[offsets[i] + j] = notes.probability[who[i], j]
    return who[:count], accepted[:count], probability, offsets[: count + 1]


@kernel
def _note(
    kept: Lent[Kept],
    sequences: Int64,
    source: UInt8,
    probability: Float32,
    given: Int64,
    asked: Int64,
    nodes: Int32,
    chains: Int64,
    length: int,
) -> None:
    lent = borrowed(kept.arrays)
    notes, drafted_of = lent.notes, lent.drafted
    notes.given[:] = 0
    notes.filled[:] = 0
    notes.asked[:] = 0
    for i in range(len(sequences)):
        sequence = sequences[i]
        notes.given[sequence] = given[i + 1] - given[i]
        notes.filled[sequence] = max(0, length - notes.given[sequence])
        notes.asked[sequence] = asked[i + 1] - asked[i]
        for j in range(given[i + 1] - given[i]):
            notes.source[sequence, j] = source[given[i] + j]
            notes.probability[sequence, j] = probability[given[i] + j]
            notes.node[sequence, j] = nodes[chains[i] + j]
            drafted_of[source[given[i] + j]] += 1

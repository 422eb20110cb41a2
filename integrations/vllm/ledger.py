"""What was drafted for each sequence in the last step, and how much of it the target accepted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.integrations.vllm.statistics import Statistics
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64, UInt8


class Verified(NamedTuple):
    """The drafts of the last step that have been verified since, n of them.

    Attributes:
        sequences: int64 `(n,)`.
        drafted: int64 `(n,)`, tokens drafted.
        accepted: int32 `(n,)`, of these accepted.
    """

    sequences: Int64
    drafted: Int64
    accepted: Int32


class Ledger:
    """Keeps each sequence's last draft until its outcome is known, and counts both in `Statistics`."""

    def __init__(self, sequences: int, longest: int, statistics: Statistics) -> None:
        self._statistics = statistics
        self._length = np.zeros(sequences, np.int64)
        self._source = np.zeros((sequences, longest), np.uint8)

    def settle(self, sequences: Int64, previous: Int64, length: Int32, new: Int64) -> Verified:
        """Find out what became of the drafts of the last step, and forget them.

        A step commits the accepted tokens and one more. Where calls were skipped in between nobody knows.

        Args:
            sequences: int64 `(rows,)`, -1 = none.
            previous: int64 `(rows,)`, each row's length in the last call.
            length: int32 `(rows or more,)`, its length now.
            new: int64 `(rows,)`, tokens of the last step.
        """
        accepted = self._statistics.accepted
        return Verified(*_settle(sequences, previous, length, new, self._length, self._source, accepted))

    def note(self, sequences: Int64, source: UInt8, offsets: Int64) -> None:
        """Remember a ragged batch of drafts, one for each of `sequences`."""
        _note(sequences, source, offsets, self._length, self._source, self._statistics.drafted)


@kernel
def _settle(
    sequences: Int64,
    previous: Int64,
    length: Int32,
    new: Int64,
    drafts: Int64,
    sources: UInt8,
    totals: Int64,
) -> tuple[Int64, Int64, Int32]:
    rows = sequences.shape[0]
    who = np.empty(rows, np.int64)
    drafted = np.empty(rows, np.int64)
    accepted = np.empty(rows, np.int32)
    count = 0
    for i in range(rows):
        sequence = sequences[i]
        if sequence >= 0 and drafts[sequence] > 0 and new[i] > 0 and previous[i] + new[i] == length[i]:
            good = min(new[i] - 1, drafts[sequence])
            for j in range(good):
                totals[sources[sequence, j]] += 1
            who[count] = sequence
            drafted[count] = drafts[sequence]
            accepted[count] = good
            count += 1
    drafts[:] = 0
    return who[:count], drafted[:count], accepted[:count]


@kernel
def _note(sequences: Int64, source: UInt8, offsets: Int64, drafts: Int64, sources: UInt8, totals: Int64) -> None:
    for i in range(sequences.shape[0]):
        size = offsets[i + 1] - offsets[i]
        drafts[sequences[i]] = size
        for j in range(size):
            sources[sequences[i], j] = source[offsets[i] + j]
            totals[source[offsets[i] + j]] += 1

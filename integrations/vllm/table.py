"""The known sequences: what an entry holds, and how entries come, grow, are handed out and go; for `tracker`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from freedraft.integrations.vllm.fingerprint import fingerprint
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

UInt64 = NDArray[np.uint64]

EDGE = 16
"""Tokens at the head and at the tail of a text that are looked at in every step; also the age, in tokens, below which
a sequence is young."""

UNKNOWN = -1
POSTPONED = -2


class Table(NamedTuple):
    """The known sequences, an entry each; every array has shape `(capacity,)`.

    Attributes:
        length: int64, tokens of the text as it was when last seen; 0 = the entry is free.
        taken: int64, how many of them were handed to the drafter.
        written: int64, the place from which on each token was a step's new one, so that the model wrote it.
        seen: int64, the step when last seen.
        checked: int64, the step when its whole text was last compared with a row.
        text: uint64, the fingerprint of the whole text.
        handed: uint64, the fingerprint of the `taken` tokens as they were handed to the drafter; they differ from the
            text where another sequence was in the row meanwhile.
        head: uint64, of its first `EDGE` tokens.
        tail: uint64, of its last `EDGE` tokens.
    """

    length: Int64
    taken: Int64
    written: Int64
    seen: Int64
    checked: Int64
    text: UInt64
    handed: UInt64
    head: UInt64
    tail: UInt64


class Batch(NamedTuple):
    """What vLLM shows in one step.

    Attributes:
        length: int32 `(rows or more,)`, tokens in each row.
        new: int64 `(rows,)`, how many of them this step added.
        tokens: int32 `(rows or more, width)`, the rows; columns from `length` on are stale.
    """

    length: Int32
    new: Int64
    tokens: Int32


class Bounds(NamedTuple):
    """How much a step may do; `tracker.SequenceTracker` has the details."""

    step_tokens: int
    idle_sequences: int
    idle_tokens: int
    idle_steps: int
    routine_tokens: int
    most_read: int


@kernel
def lengths_fit(length: Int32, rows: int, width: int) -> bool:
    """Whether the lengths of all `rows` rows are in 0..width."""
    fit = True
    for i in range(rows):
        fit &= 0 <= length[i] <= width
    return fit


@kernel
def advance(table: Table, batch: Batch, owner: Int64, step: int, most: int) -> tuple[Int64, Int64, Int64]:
    """Bring the found sequences up to the length of their rows, and make entries for unknown text.

    Args:
        table: the known sequences; needs as many entries as rows at least.
        batch: the rows.
        owner: int64 `(rows,)`, of `match_rows`; unknown text gets its entry here. -1 is left where there is none:
            an empty row, a row that holds something else than token ids, or one put off because more than `most`
            tokens are new to the tracker in this step.
        step: number of this step.
        most: tokens, except that the first unknown text is never put off.

    Returns:
        `previous` int64 `(rows,)`, the length when last seen, 0 for a new one; the entries evicted and those made,
        int64 each. An entry can be in both.
    """
    rows = batch.new.shape[0]
    previous = np.zeros(rows, np.int64)
    closed = np.empty(rows, np.int64)
    opened = np.empty(rows, np.int64)
    number_closed = 0
    number_opened = 0
    read = 0
    for i in range(rows):
        length = int(batch.length[i])
        row = batch.tokens[i]
        entry = owner[i]
        if entry < 0:
            put_off = entry == POSTPONED or (read > 0 and read + length > most)
            owner[i] = UNKNOWN
            if put_off or length == 0 or _lowest(row, 0, length) < 0:
                continue
            read += length
            entry, evicted = _vacate(table, step)
            if evicted:
                closed[number_closed] = entry
                number_closed += 1
            opened[number_opened] = entry
            number_opened += 1
            table.length[entry] = 0
            table.taken[entry] = 0
            table.text[entry] = 0
            table.handed[entry] = 0
            table.seen[entry] = step
            table.checked[entry] = step
            owner[i] = entry
        known = int(table.length[entry])
        if _lowest(row, known, length) < 0:
            # An unknown row was checked above, so this one is known; its entry stays as it is, for another time.
            owner[i] = UNKNOWN
            continue
        previous[i] = known
        if known != length - batch.new[i]:
            table.written[entry] = length
        table.text[entry] += fingerprint(row, known, length)
        table.head[entry] = fingerprint(row, 0, min(EDGE, length))
        table.tail[entry] = fingerprint(row, max(0, length - EDGE), length)
        table.length[entry] = length
    return previous, closed[:number_closed], opened[:number_opened]


@kernel
def evict_idle(table: Table, step: int, bounds: Bounds) -> Int64:
    """Free the least recently seen entries that are in no row, until the rest are within the bounds.

    Returns:
        int64, the entries freed.
    """
    capacity = table.length.shape[0]
    evicted = np.empty(capacity, np.int64)
    count = 0
    idle = 0
    held = 0
    for entry in range(capacity):
        if table.length[entry] > 0 and table.seen[entry] != step:
            idle += 1
            held += table.taken[entry]
    while idle > 0:
        entry = _least_recent(table, step)
        old = step - table.seen[entry] > bounds.idle_steps
        if not old and idle <= bounds.idle_sequences and held <= bounds.idle_tokens:
            break
        idle -= 1
        held -= table.taken[entry]
        table.length[entry] = 0
        evicted[count] = entry
        count += 1
    return evicted[:count]


@kernel
def catch_up(table: Table, batch: Batch, owner: Int64, most: int) -> tuple[Int64, Int64, Int32]:
    """Hand out text that the drafter has not got yet, at most `most` tokens, first to those that lack least.

    Returns:
        A ragged batch: entries int64 `(n,)`, offsets int64 `(n + 1,)`, tokens int32.
    """
    rows = owner.shape[0]
    lacking = np.zeros(rows, np.int64)
    total = 0
    for i in range(rows):
        if owner[i] >= 0:
            lacking[i] = batch.length[i] - table.taken[owner[i]]
            total += lacking[i]
    if total > most:
        room = most
        for i in np.argsort(lacking):
            lacking[i] = min(lacking[i], room)
            room -= lacking[i]
        total = most
    entries = np.empty(rows, np.int64)
    offsets = np.zeros(rows + 1, np.int64)
    tokens = np.empty(total, np.int32)
    count = 0
    for i in range(rows):
        if lacking[i] > 0:
            entry = owner[i]
            start = table.taken[entry]
            tokens[offsets[count] : offsets[count] + lacking[i]] = batch.tokens[i, start : start + lacking[i]]
            table.taken[entry] += lacking[i]
            table.handed[entry] += fingerprint(batch.tokens[i], start, start + lacking[i])
            entries[count] = entry
            offsets[count + 1] = offsets[count] + lacking[i]
            count += 1
    return entries[:count], offsets[: count + 1], tokens


@kernel
def _vacate(table: Table, step: int) -> tuple[int, bool]:
    """Find a free entry, or else the least recently seen one that is in no row; the second tells which it was."""
    for entry in range(table.length.shape[0]):
        if table.length[entry] == 0:
            return entry, False
    return _least_recent(table, step), True


@kernel
def _least_recent(table: Table, step: int) -> int:
    best = -1
    for entry in range(table.length.shape[0]):
        idle = table.length[entry] > 0 and table.seen[entry] != step
        if idle and (best < 0 or table.seen[entry] < table.seen[best]):
            best = entry
    return best


@kernel
def _lowest(row: Int32, start: int, stop: int) -> int:
    """Return the lowest token of `row[start:stop]`; 0 for none."""
    span = row[start:stop]
    lowest = np.int32(0)
    for i in range(span.shape[0]):
        lowest = min(lowest, span[i])
    return int(lowest)

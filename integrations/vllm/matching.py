"""Which known sequence is in which row of vLLM's batch; `tracker` tells why this suffices."""

from __future__ import annotations

import numpy as np

from freedraft.integrations.vllm.fingerprint import fingerprint
from freedraft.integrations.vllm.table import EDGE, POSTPONED, UNKNOWN, Batch, Table
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Bool, Int32, Int64

NEVER = 2**62

MOST_READS = 8
"""A search reads a row this many times at most; texts beyond that look alike on purpose, and the row counts as new."""

LENGTH_MIX = np.uint64(0x9E3779B97F4A7C15)
TAIL_MIX = np.uint64(0xFF51AFD7ED558CCD)
SHIFT = np.uint64(32)


@kernel
def match_rows(table: Table, batch: Batch, before: Int64, step: int, routine: int, most: int) -> Int64:
    """Find the sequence in each row; marks the found ones as seen in this step.

    Args:
        table: the known sequences.
        batch: the rows.
        before: int64 `(rows or more,)`, the entry that each row held in the last call; -1 = none.
        step: number of this step, above all before.
        routine: read rows that nothing is suspicious about for up to this many tokens.
        most: read no row that brings the tokens read in this step above this, except the first.

    Returns:
        int64 `(rows,)`: an entry, `UNKNOWN` for text that no entry is a prefix of, or `POSTPONED` for want of checks.
    """
    rows = batch.new.shape[0]
    owner = np.full(rows, UNKNOWN, np.int64)
    suspicious = np.zeros(rows, np.bool_)
    ambiguous = _ambiguous(table)
    spent = 0

    for i in range(rows):
        entry = before[i]
        if entry < 0 or table.length[entry] == 0 or table.length[entry] > batch.length[i]:
            continue
        if not _edges_match(table, entry, batch.tokens[i]):
            continue
        known = int(table.length[entry])
        if known != batch.length[i] - batch.new[i] or ambiguous[entry]:
            if spent > 0 and spent + known > most:
                owner[i] = POSTPONED
                continue
            spent += known
            if not _is_prefix(table, entry, batch.tokens[i], step):
                continue
        else:
            suspicious[i] = known - table.written[entry] < EDGE
        owner[i] = entry
        table.seen[entry] = step

    for i in range(rows):
        if owner[i] == UNKNOWN and batch.length[i] > 0:
            owner[i], spent = _search(table, batch, i, step, spent, most)

    # What is left of the reading goes to rows that are taken for what they were without having been read.
    for turn in (suspicious, _whose_turn(table, batch, owner, routine)):
        for i in range(rows):
            entry = owner[i]
            if entry < 0 or not turn[i] or table.checked[entry] == step:
                continue
            known = int(table.length[entry])
            if spent > 0 and spent + known > most:
                continue
            spent += known
            if not _is_prefix(table, entry, batch.tokens[i], step):
                table.seen[entry] = step - 1
                owner[i], spent = _search(table, batch, i, step, spent, most)
    return owner


@kernel
def _is_prefix(table: Table, entry: int, row: Int32, step: int) -> bool:
    """Whether the row begins with the entry's text; reads it whole."""
    whole = fingerprint(row, 0, int(table.length[entry]))
    if whole != table.text[entry] or not _was_handed(table, entry, row, whole):
        return False
    table.checked[entry] = step
    return True


@kernel
def _was_handed(table: Table, entry: int, row: Int32, whole: np.uint64) -> bool:
    """Whether the row begins with what the drafter got of the entry; `whole` is what all of it should give."""
    taken = int(table.taken[entry])
    if taken < table.length[entry]:
        whole = fingerprint(row, 0, taken)
    return whole == table.handed[entry]


@kernel
def _search(table: Table, batch: Batch, i: int, step: int, spent: int, most: int) -> tuple[int, int]:
    """Find the longest text among those in no row that row i begins with, and mark it as seen."""
    row = batch.tokens[i]
    length = int(batch.length[i])
    head = fingerprint(row, 0, min(EDGE, length))
    best = UNKNOWN
    last = 0
    whole = np.uint64(0)
    reads = 0
    # A sequence that moved and missed no call has the very length that this row had before the step: look there first,
    # because that costs no access to the row for the others.
    for exact in (True, False):
        for entry in range(table.length.shape[0]):
            known = int(table.length[entry])
            if known == 0 or known > length or table.seen[entry] == step:
                continue
            if (known == length - batch.new[i]) != exact or (best >= 0 and known <= table.length[best]):
                continue
            if (known >= EDGE and table.head[entry] != head) or not _edges_match(table, entry, row):
                continue
            if known != last:
                if spent > 0 and spent + known > most:
                    return POSTPONED, spent
                if reads == MOST_READS:
                    break
                spent += known
                reads += 1
                last = known
                whole = fingerprint(row, 0, known)
            if whole == table.text[entry] and _was_handed(table, entry, row, whole):
                best = entry
        if best >= 0:
            break
    if best >= 0:
        table.seen[best] = step
        table.checked[best] = step
    return best, spent


@kernel
def _whose_turn(table: Table, batch: Batch, owner: Int64, routine: int) -> Bool:
    """Mark the rows to be read whole though nothing is suspicious: the longest unread, one at least."""
    rows = batch.new.shape[0]
    marks = np.zeros(rows, np.bool_)
    last = np.zeros(rows, np.int64)
    total = 0
    for i in range(rows):
        last[i] = table.checked[owner[i]] if owner[i] >= 0 else NEVER
        total += batch.length[i]
    if total <= routine:
        marks[:] = True
        return marks
    planned = 0
    for i in np.argsort(last):
        planned += batch.length[i]
        if last[i] == NEVER or (planned > routine and planned > batch.length[i]):
            break
        marks[i] = True
    return marks


@kernel
def _edges_match(table: Table, entry: int, row: Int32) -> bool:
    """Whether the row has the entry's head and tail where they should be."""
    known = int(table.length[entry])
    return bool(
        fingerprint(row, max(0, known - EDGE), known) == table.tail[entry]
        and fingerprint(row, 0, min(EDGE, known)) == table.head[entry]
    )


@kernel
def _ambiguous(table: Table) -> Bool:
    """Mark the entries that have the same length, head and tail as another, but another text."""
    capacity = table.length.shape[0]
    size = 4
    while size < 2 * capacity:
        size *= 2
    places = np.full(size, -1, np.int64)
    marks = np.zeros(capacity, np.bool_)
    twin = np.full(capacity, -1, np.int64)
    for entry in range(capacity):
        if table.length[entry] == 0:
            continue
        key = (np.uint64(table.length[entry]) * LENGTH_MIX) ^ (table.tail[entry] * TAIL_MIX) ^ table.head[entry]
        at = np.int64((key ^ (key >> SHIFT)) & np.uint64(size - 1))
        while places[at] >= 0:
            other = places[at]
            if (
                table.length[other] == table.length[entry]
                and table.tail[other] == table.tail[entry]
                and table.head[other] == table.head[entry]
            ):
                if table.text[other] == table.text[entry]:
                    twin[entry] = other
                    break
                marks[other] = True
                marks[entry] = True
            at = (at + 1) & (size - 1)
        if twin[entry] < 0:
            places[at] = entry
    # Equal texts stand in the table once, so the others learn from that one.
    for entry in range(capacity):
        if twin[entry] >= 0 and marks[twin[entry]]:
            marks[entry] = True
    return marks

"""Rows of likely next tokens, by the last few tokens, in a table of bounded size.

A row belongs to a context of 1 to `MAX_CONTEXT` tokens and lists up to k tokens that may follow, likeliest first. The
table is set-associative, as a processor's cache: a context's hash names a set of `WAYS` rows, and a new context takes
the place of the one in its set that was written longest ago. Two contexts are told apart by 31 more bits of the hash;
where even those agree they share a row, which costs a wrong guess now and then. A row is everybody's, or one sequence's
alone: its owner's number goes into the hash, too.

Contexts are int32 `(MAX_CONTEXT,)`, the newest token first, `NO_TOKEN` where the text has no more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

NO_TOKEN = -1
MAX_CONTEXT = 4
EVERYBODY = 0
WAYS = 4

# Fields of a row, one int32 each; its tokens follow.
CHECK = 0  # bits of the hash; 0 = the row is free
STAMP = 1  # when it was written last
TRUST = 2  # 0 = from text; otherwise how often in a row the target's likeliest token was the same, up to MAX_TRUST
TOKENS = 3

MAX_TRUST = 3


class Table(NamedTuple):
    """Rows of all contexts.

    Attributes:
        rows: int32 `(sets * WAYS, TOKENS + k)`.
        clock: int64 `(1,)`, rows written so far.
    """

    rows: Int32
    clock: Int64


def new_table(memory: int, k: int) -> Table:
    """An empty table of rows of k tokens that takes at most `memory` bytes; the system hands them out as used."""
    sets = max(1, memory // (4 * (TOKENS + k) * WAYS))
    return Table(np.zeros((sets * WAYS, TOKENS + k), np.int32), np.zeros(1, np.int64))


def owners(scope: str, opened: int, count: int) -> Int64:
    """The owners of the rows that `count` new sequences read and write, after `opened` earlier ones; int64 `(count,)`.

    Args:
        scope: `engine` = all share the rows; `off` = each has its own.
    """
    return np.full(count, EVERYBODY) if scope == "engine" else np.arange(opened + 1, opened + 1 + count)


@kernel
def hash_context(context: Int32, length: int, owner: int) -> Any:
    """63 well-mixed bits of the newest `length` tokens of an owner's, `EVERYBODY` or another number; int64."""
    mixed = (np.uint64(length) + np.uint64(owner) * np.uint64(MAX_CONTEXT + 1)) * np.uint64(0x9E3779B97F4A7C15)
    for i in range(length):
        mixed ^= np.uint64(context[i])
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(32)
    return np.int64(mixed >> np.uint64(1))


@kernel
def find_row(table: Table, hashed: int) -> int:
    """The row of a context by its hash, or -1."""
    rows = table.rows
    first = (hashed >> 31) % (len(rows) // WAYS) * WAYS
    check = np.int32((hashed & 0x7FFFFFFF) | 1)
    for row in range(first, first + WAYS):
        if rows[row, CHECK] == check:
            return row
    return -1


@kernel
def take_row(table: Table, hashed: int) -> int:
    """A row for a context that has none, empty: a free one of its set, or the one written longest ago."""
    rows = table.rows
    first = (hashed >> 31) % (len(rows) // WAYS) * WAYS
    taken, oldest = first, np.int64(-1)
    for row in range(first, first + WAYS):
        if rows[row, CHECK] == 0:
            taken = row
            break
        # The stamp is the clock's low half; ages are right while a row is younger than 2^32 writes.
        age = (table.clock[0] - rows[row, STAMP]) & 0xFFFFFFFF
        if age > oldest:
            taken, oldest = row, age
    rows[taken, CHECK] = np.int32((hashed & 0x7FFFFFFF) | 1)
    rows[taken, TOKENS:] = NO_TOKEN
    return taken


@kernel
def stamp_row(table: Table, row: int, trust: int) -> None:
    """Mark a row as just written."""
    table.clock[0] += 1
    table.rows[row, STAMP] = np.int32(table.clock[0] & 0x7FFFFFFF) | np.int32(-((table.clock[0] >> 31) & 1) << 31)
    table.rows[row, TRUST] = trust


@kernel
def learn_ranked(table: Table, context: Int32, length: int, owner: int, ranked: Int32, fresh: int) -> None:
    """Write what the target ranked highest after a context, into the rows of its newest 1 to `length` tokens.

    The first `fresh` of `ranked` come first, then what the row held, then the rest of `ranked`, while there is room.

    Args:
        ranked: int32 `(k,)`, likeliest first, ended by `NO_TOKEN` where there are fewer.
    """
    k = table.rows.shape[1] - TOKENS
    merged = np.empty(k, np.int32)
    for n in range(1, length + 1):
        if context[n - 1] == NO_TOKEN:
            break
        hashed = hash_context(context, n, owner)
        row = find_row(table, hashed)
        trust = 1
        if row < 0:
            row = take_row(table, hashed)
        elif table.rows[row, TOKENS] == ranked[0]:
            trust = min(table.rows[row, TRUST] + 1, MAX_TRUST)
        tokens = table.rows[row, TOKENS:]
        used = append_new(merged, 0, ranked[:fresh])
        used = append_new(merged, used, tokens)
        used = append_new(merged, used, ranked[fresh:])
        merged[used:] = NO_TOKEN
        tokens[:] = merged
        stamp_row(table, row, trust)


@kernel
def learn_next(table: Table, context: Int32, length: int, owner: int, token: int) -> None:
    """Put a token that followed a context in a text at the front of its rows."""
    first = np.empty(1, np.int32)
    first[0] = token
    merged = np.empty(table.rows.shape[1] - TOKENS, np.int32)
    for n in range(1, length + 1):
        if context[n - 1] == NO_TOKEN:
            break
        hashed = hash_context(context, n, owner)
        row = find_row(table, hashed)
        if row < 0:
            row = take_row(table, hashed)
        tokens = table.rows[row, TOKENS:]
        used = append_new(merged, append_new(merged, 0, first), tokens)
        merged[used:] = NO_TOKEN
        tokens[:] = merged
        stamp_row(table, row, 0)


@kernel
def append_new(merged: Int32, used: int, tokens: Int32) -> int:
    """Append the tokens that `merged[:used]` lacks, while there is room; return the new length."""
    for token in tokens:
        if token == NO_TOKEN or used == len(merged):
            break
        known = False
        for i in range(used):
            known = known or merged[i] == token
        if not known:
            merged[used] = token
            used += 1
    return used


@kernel
def push_token(context: Int32, token: int) -> None:
    """Move a context on by a token."""
    for i in range(len(context) - 1, 0, -1):
        context[i] = context[i - 1]
    context[0] = token


@kernel
def context_at(committed: Int32, tokens: Int32, parents: Int32, node: int, context: Int32) -> int:
    """Write the newest tokens up to draft node `node`, -1 = committed text only; return how many are drafted."""
    used = 0
    while node >= 0 and used < len(context):
        context[used] = tokens[node]
        used += 1
        node = parents[node]
    for i in range(len(context) - used):
        context[used + i] = committed[i]
    return used

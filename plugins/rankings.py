"""What the target ranked when it last saw a context, as evidence: token recycling (Luo et al. 2024) inside fusion.

The target's likeliest next tokens at every verified position, those of rejected nodes too, go into a table by the last
few tokens (`adjacency`). Where no text has a promising context, a row of that table may still have a guess.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins.adjacency import (
    MAX_CONTEXT,
    NO_TOKEN,
    TOKENS,
    TRUST,
    Table,
    context_at,
    find_row,
    hash_context,
    learn_ranked,
    new_table,
)
from freedraft.plugins.evidence import KIND, LATEST, LIKELIEST, MATCHED, NO_STATE, PLACE, RANKED, SEEN, TEXT, TIMES
from freedraft.plugins.verified import known_positions
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

K = 8  # tokens of a row
CONTEXT = 3  # rows for the last 1 to this many tokens
FRESH = 4  # how many of a new ranking go before what the row held
TABLE_BYTES = 2**26
FIRST_SHARE = 9  # the share bucket of the first of a row; one less for each rank behind it, 0 for a token not in it


class Rankings(NamedTuple):
    """What is kept for each slot.

    Attributes:
        context: int32 `(slots, MAX_CONTEXT)`, the newest committed tokens of each sequence, newest first.
        shown: int32 `(slots,)`, verified positions of the last draft whose ranking waits to be learnt.
        ranked: int32 `(slots, longest + 1, K)`, these; `(slots, 0, K)` where rankings are not used.
    """

    context: Int32
    shown: Int32
    ranked: Int32


def new_rankings(used: bool, longest: int) -> tuple[Table, Rankings]:
    """A table, of next to nothing where rankings are not used, and room for no sequence."""
    table = new_table(TABLE_BYTES if used else 1, K)
    ranked = np.zeros((0, longest + 1 if used else 0, K), np.int32)
    return table, Rankings(np.zeros((0, MAX_CONTEXT), np.int32), np.zeros(0, np.int32), ranked)


@kernel
def observe_batch(
    rankings: Rankings, considered: Int64, parents: Int32, slots: Int64, top_k: Int32, offsets: Int64
) -> None:
    """Keep the rankings, int32 `(positions, k)`, until what was committed has been judged without them.

    Args:
        considered: int64 `(slots,)`, nodes of each last draft.
        parents: int32 `(slots, longest + 1)`, theirs.
    """
    k = min(K, top_k.shape[1])
    for row in range(len(slots)):
        slot = slots[row]
        shown = known_positions(offsets[row + 1] - offsets[row], parents[slot], considered[slot])
        shown = min(shown, rankings.ranked.shape[1])
        rankings.shown[slot] = shown
        rankings.ranked[slot, :shown] = NO_TOKEN
        for i in range(shown):
            rankings.ranked[slot, i, :k] = top_k[offsets[row] + i, :k]


@kernel
def learn_rankings(table: Table, rankings: Rankings, owner: int, slot: int, tokens: Int32, parents: Int32) -> None:
    """Learn what was shown of the draft that followed the sequence's context; the context is not moved.

    Args:
        tokens: int32, the draft's nodes.
        parents: int32, theirs; -1 = the context.
    """
    context = np.empty(MAX_CONTEXT, np.int32)
    for i in range(rankings.shown[slot]):
        if rankings.ranked[slot, i, 0] != NO_TOKEN:
            context_at(rankings.context[slot], tokens, parents, i - 1, context)
            learn_ranked(table, context, CONTEXT, owner, rankings.ranked[slot, i], FRESH)
    rankings.shown[slot] = 0


@kernel
def gather_rankings(table: Table, owner: int, context: Int32, evidence: Int64, used: int) -> int:
    """Add the rows of the last 1 to `CONTEXT` tokens to `evidence`, after its first `used`; return how many it has."""
    rows = table.rows
    for length in range(CONTEXT, 0, -1):
        if used == len(evidence):
            break
        if context[length - 1] != NO_TOKEN:
            row = find_row(table, hash_context(context, length, owner))
            if row >= 0 and rows[row, TOKENS] >= 0:
                evidence[used, KIND] = RANKED
                evidence[used, MATCHED] = length
                evidence[used, SEEN] = max(1, rows[row, TRUST])
                evidence[used, LIKELIEST] = rows[row, TOKENS]
                evidence[used, TIMES] = FIRST_SHARE
                evidence[used, LATEST] = NO_TOKEN
                evidence[used, PLACE] = NO_STATE
                evidence[used, TEXT] = row
                used += 1
    return used


@kernel
def add_ranked(table: Table, evidence: Int64, used: int, tokens: Int64, found: int) -> int:
    """Add what ranked behind the likeliest to the candidates `tokens`, int64, after the first `found`; return how many.

    The longest context's row comes first.
    """
    for i in range(used):
        if evidence[i, KIND] == RANKED:
            ranked = table.rows[evidence[i, TEXT], TOKENS:]
            for rank in range(1, len(ranked)):
                known = ranked[rank] == NO_TOKEN
                for j in range(found):
                    known = known or tokens[j] == ranked[rank]
                if not known and found < len(tokens):
                    tokens[found] = ranked[rank]
                    found += 1
    return found


@kernel
def count_rankings(table: Table, evidence: Int64, used: int, tokens: Int64, times: Int64) -> None:
    """Fill `times[j, i]`, int64 `(tokens, MAX_CONTEXTS)`: the share bucket of token j in row i; texts are left out."""
    for i in range(used):
        if evidence[i, KIND] == RANKED:
            ranked = table.rows[evidence[i, TEXT], TOKENS:]
            for j in range(len(tokens)):
                times[j, i] = 0
                for rank in range(len(ranked)):
                    if ranked[rank] == tokens[j]:
                        times[j, i] = FIRST_SHARE - rank

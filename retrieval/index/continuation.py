"""The likeliest continuation of a text in one segment, from a cursor that has followed it."""

from __future__ import annotations

from freedraft.retrieval.index.follow import (
    AT_LENGTH,
    CURSOR_FIELDS,
    DAMAGED,
    advance,
    at_root,
    context_count,
    likeliest_of,
    settle,
    shorten,
)
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32

CONTEXTS_TRIED = 4
SUFFIXES_TRIED = 12

# As `own_text.ESCAPE`, but larger: what followed once in another's text is less likely to follow again than in the own
# one. On Python sources and their documentation 5 to 8 fitted best; a conversation wants more.
ESCAPE = 8.0


@kernel
def copy_cursor(source: Int32, target: Int32) -> None:
    """Let `target` be where `source` is."""
    for field in range(CURSOR_FIELDS):
        target[field] = source[field]


@kernel
def continue_one(
    text: Int32,
    nodes: Int32,
    edges: Int32,
    cursor: Int32,
    best: Int32,
    budget: int,
    min_match: int,
    min_probability: float,
    tokens: Int32,
    probability: Float32,
) -> int:
    """Write the continuation of a text; of its longest contexts it is that whose next token is the most likely.

    Args:
        text: of the segment, as `nodes` and `edges`.
        nodes: see `follow.Automaton`.
        edges: likewise.
        cursor: where the text is, settled; moved.
        best: room for a cursor.
        budget: tokens to write, at most.
        min_match: contexts of fewer tokens say nothing.
        min_probability: it ends before the token with which all of it is less likely.
        tokens: written from the left; of any integer type, room for `budget`.
        probability: likewise, float32.

    Returns:
        How many tokens; or -1 where the segment is damaged, with nothing of use written.
    """
    best_likelihood = 0.0
    tried, count = 0, 0
    for _ in range(SUFFIXES_TRIED):
        if at_root(cursor) or cursor[AT_LENGTH] < min_match:
            break
        # A suffix that occurs exactly where a longer one does is no other context.
        if context_count(nodes, cursor) != count:
            count = context_count(nodes, cursor)
            tried += 1
            _, times = likeliest_of(text, nodes, cursor)
            likelihood = times / (count + ESCAPE / cursor[AT_LENGTH])
            if likelihood > best_likelihood:
                best_likelihood = likelihood
                copy_cursor(cursor, best)
            if tried == CONTEXTS_TRIED:
                break
        if shorten(text, nodes, edges, cursor) == DAMAGED or settle(text, nodes, edges, cursor) == DAMAGED:
            return -1
    if best_likelihood == 0.0:
        return 0
    copy_cursor(best, cursor)
    likelihood = 1.0
    for i in range(budget):
        if at_root(cursor):
            return i
        token, times = likeliest_of(text, nodes, cursor)
        likelihood *= min(1.0, times / (context_count(nodes, cursor) + ESCAPE / cursor[AT_LENGTH]))
        if likelihood < min_probability or token < 0:
            return i
        tokens[i] = token
        probability[i] = likelihood
        if advance(text, nodes, edges, cursor, token) == DAMAGED:
            return -1
    return budget

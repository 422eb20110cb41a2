"""Drafting a batch row from one segment of an index, as a GPU thread does it, and the same loop on the CPU.

The GPU's kernel calls `draft_row` too: Numba compiles it for either target.

What a row keeps from step to step is where its text is in the segment, and so much of the text's end as is needed to
see whether the slot still has the same owner. Where it has not, or where much came at once (a new prompt), the text's
last `REACH` tokens are followed anew: a row costs at most that many tokens a step, and no match is longer that began
before it was followed.
"""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.cuda.places import sequence_length as length_of_slot
from freedraft.retrieval.index.continuation import continue_one, copy_cursor
from freedraft.retrieval.index.follow import CURSOR_FIELDS, DAMAGED, FINE, Automaton, advance, to_root
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64

REACH = 64
TAIL = 8
"""Tokens of a text's end that are kept, to be recognised."""
SEEN_FIELDS = 1 + TAIL
"""Tokens that were followed, then the last of them, the latest first."""

sequence_length = kernel(length_of_slot)


@kernel
def catch_up(text: Int32, nodes: Int32, edges: Int32, cursor: Int32, seen: Int32, tokens: Int32, length: int) -> int:
    """Follow what came to a slot's text since `seen`; FINE, or DAMAGED with the cursor at the root."""
    start = seen[0]
    same = 0 < start <= length and length - start <= REACH
    if same:
        for i in range(min(TAIL, start)):
            if seen[1 + i] != tokens[start - 1 - i]:
                same = False
    if not same:
        to_root(cursor)
        start = max(0, length - REACH)
    status = FINE
    for i in range(start, length):
        # A negative token is none of the model's; no text goes on across it.
        if tokens[i] < 0:
            to_root(cursor)
        elif advance(text, nodes, edges, cursor, tokens[i]) == DAMAGED:
            to_root(cursor)
            status = DAMAGED
    seen[0] = length
    for i in range(min(TAIL, length)):
        seen[1 + i] = tokens[length - 1 - i]
    return status


@kernel
def draft_row(
    text: Int32,
    nodes: Int32,
    edges: Int32,
    cursor: Int32,
    seen: Int32,
    moved: Int32,
    best: Int32,
    tokens: Int32,
    length: int,
    budget: int,
    min_match: int,
    least: float,
    found: Int32,
    found_probability: Float32,
    drafts: Int64,
    probability: Float32,
) -> int:
    """Replace a row's draft where the segment expects more accepted tokens.

    Args:
        text: of the segment, as `nodes` and `edges`.
        nodes: see `follow.Automaton`.
        edges: likewise.
        cursor: int32 `(CURSOR_FIELDS,)`, the slot's; kept from step to step.
        seen: int32 `(SEEN_FIELDS,)`, likewise.
        moved: room for a cursor.
        best: room for another.
        tokens: int32 `(width,)`, the slot's.
        length: tokens in it.
        budget: tokens to draft, at most.
        min_match: contexts of fewer tokens say nothing.
        least: a draft ends before the token whose probability is below this.
        found: int32 `(k,)`, room for a draft.
        found_probability: float32 `(k,)`, likewise.
        drafts: int64 `(k,)`, read and written: a draft, then the last token again.
        probability: float32 `(k,)`, likewise: of the draft, then 0.

    Returns:
        Tokens of the new draft; -1 where the old one stays.
    """
    if catch_up(text, nodes, edges, cursor, seen, tokens, length) == DAMAGED:
        return -1
    copy_cursor(cursor, moved)
    room = min(min(budget, drafts.shape[0]), tokens.shape[0] - length)
    count = continue_one(text, nodes, edges, moved, best, room, min_match, least, found, found_probability)
    ours, theirs = np.float32(0.0), np.float32(0.0)
    for i in range(count):
        ours += found_probability[i]
    for i in range(drafts.shape[0]):
        theirs += probability[i]
    if ours <= theirs:
        return -1
    for i in range(drafts.shape[0]):
        drafts[i] = found[i] if i < count else tokens[length - 1]
        probability[i] = found_probability[i] if i < count else np.float32(0.0)
    return count


@kernel
def draft_rows_on_cpu(
    automaton: Automaton,
    cursors: Int32,
    seen: Int32,
    tokens: Int32,
    lengths: Int32,
    rows: Int64,
    active: Int32,
    budget: int,
    min_match: int,
    least: float,
    drafts: Int64,
    probability: Float32,
    counts: Int32,
) -> None:
    """Draft for every row: the reference that the GPU must equal. The arguments are those of `DeviceCorpus.draft`."""
    text, nodes, edges = automaton
    moved, best = np.empty(CURSOR_FIELDS, np.int32), np.empty(CURSOR_FIELDS, np.int32)
    found = np.empty(drafts.shape[1], np.int32)
    found_probability = np.empty(drafts.shape[1], np.float32)
    for row in range(len(rows)):
        slot = rows[row]
        length = sequence_length(tokens, lengths, slot)
        if length == 0 or active[row] <= 0:
            continue
        count = draft_row(
            text, nodes, edges, cursors[slot], seen[slot], moved, best, tokens[slot], length, budget, min_match, least,
            found, found_probability, drafts[row], probability[row],
        )  # fmt: skip
        if count >= 0:
            counts[row] = count

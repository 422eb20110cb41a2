"""The texts that fusion draws on, and a sequence's place in each.

A sequence has its own text; replies, in generations, which all sequences share; a reference of its own, if one
was given; and corpora, mapped from disk. All but the corpora live in one arena of automata, as slots there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins.evidence import (
    CONTEXTS_A_TEXT,
    CORPUS,
    COUNTED,
    KIND,
    LATEST,
    LIKELIEST,
    MATCHED,
    NEAR,
    NO_STATE,
    OWN,
    OWN_FAR,
    PLACE,
    REACH,
    REFERENCE,
    RESPONSES,
    SEEN,
    TEXT,
    TIMES,
    advance,
    find_end,
    follow,
    gather,
    root_of,
    settle,
    times_of,
)
from freedraft.plugins.responses import GENERATIONS
from freedraft.retrieval.edges import RECENT
from freedraft.retrieval.growth import HEAD_LEARNING, HEAD_LENGTH, HEAD_MATCH, HEAD_MATCH_LENGTH, text_at
from freedraft.retrieval.index import follow as index
from freedraft.retrieval.index.follow import CURSOR_FIELDS, DAMAGED, Automaton
from freedraft.retrieval.index.format import EDGE_FIELDS, NODE_FIELDS, TARGET, TOKEN
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

NONE = -1
OTHERS = GENERATIONS + 1  # texts in the arena beside the own one: the generations, then the reference
SHORTENED = 12


class Places(NamedTuple):
    """Where sequences are in the texts beside their own, by slot.

    Attributes:
        reference: int64 `(slots,)`, the slot of the reference's text, or `NONE`.
        others: int64 `(slots, OTHERS, 2)`, state and matched tokens in each generation and in the reference.
        corpora: int32 `(slots, corpora, CURSOR_FIELDS)`, as `retrieval.index.follow` keeps them.
    """

    reference: Int64
    others: Int64
    corpora: Int32


class Library(NamedTuple):
    """All texts that fusion draws on, as kernels read them.

    Attributes:
        words, pool, next_page: int32, the arena of the automata; see `retrieval.memory`.
        states: int32 `(n, STATE_WORDS)`, a view of it.
        edges: int32 `(n, 2)`, likewise.
        sequences: int32 `(slots, fields)`, a header a text of the arena.
        generations: int64 `(GENERATIONS,)`, the slots of replies, `NONE` where there are none.
        corpora: from disk.
        damaged: int64 `(1,)`, 1 + the corpus that turned out to be damaged, 0 = none.
        places: where sequences are in them.
    """

    words: Int32
    pool: Int32
    next_page: Int32
    states: Int32
    edges: Int32
    sequences: Int32
    generations: Int64
    corpora: tuple[Automaton, ...]
    damaged: Int64
    places: Places


def padded(automata: list[Automaton]) -> tuple[Automaton, ...]:
    """These, then automata of nothing up to a power of two, at least one.

    Kernels know no empty tuple, and are compiled anew for each length of one.
    """
    nodes = np.zeros((1, NODE_FIELDS), np.int32)
    nodes[0, TOKEN] = nodes[0, TARGET] = NONE
    nothing = Automaton(np.zeros(0, np.int32), nodes, np.zeros((0, EDGE_FIELDS), np.int32))
    for array in nothing:
        # As the arrays of a mapped segment are, so that all have one type.
        array.flags.writeable = False
    size = 1
    while size < len(automata):
        size *= 2
    return (*automata, *[nothing] * (size - len(automata)))


def no_places(corpora: int) -> Places:
    """Room for no sequence."""
    return Places(
        np.zeros(0, np.int64), np.zeros((0, OTHERS, 2), np.int64), np.zeros((0, corpora, CURSOR_FIELDS), np.int32)
    )


@kernel
def new_cursors(places: Places) -> tuple[Int64, Int64, Int32]:
    """Room for where one sequence, or a draft of it, is in all texts.

    Returns:
        slots int64 `(1 + OTHERS,)`, of its own text and the others in the arena, `NONE` where there is none; cursors
        int64 `(1 + OTHERS, 2)`, state and matched tokens in each; corpora int32 `(corpora, CURSOR_FIELDS)`.
    """
    return (
        np.empty(1 + OTHERS, np.int64),
        np.empty((1 + OTHERS, 2), np.int64),
        np.empty((places.corpora.shape[1], CURSOR_FIELDS), np.int32),
    )


@kernel
def begin(
    words: Int32,
    states: Int32,
    edges: Int32,
    sequences: Int32,
    generations: Int64,
    corpora: tuple[Automaton, ...],
    damaged: Int64,
    places: Places,
    slot: int,
) -> None:
    """Find a sequence's end in the other texts, of which it saw nothing so far. O(`REACH`) a text."""
    own = sequences[slot]
    for i in range(OTHERS):
        other = generations[i] if i < GENERATIONS else places.reference[slot]
        if other >= 0:
            state, matched = find_end(words, states, edges, own, root_of(sequences, other))
            places.others[slot, i, 0], places.others[slot, i, 1] = state, matched
    for i in range(places.corpora.shape[1]):
        index.to_root(places.corpora[slot, i])
    if own[HEAD_LEARNING] != 0:
        for position in range(max(0, own[HEAD_LENGTH] - REACH), own[HEAD_LENGTH]):
            follow_corpora(corpora, damaged, places.corpora[slot], text_at(words, own, position))


@kernel
def take_up(
    states: Int32,
    sequences: Int32,
    generations: Int64,
    places: Places,
    slot: int,
    slots: Int64,
    cursors: Int64,
    in_corpora: Int32,
) -> None:
    """Set the cursors to where a sequence is."""
    slots[0] = slot
    cursors[0, 0], cursors[0, 1] = sequences[slot, HEAD_MATCH], sequences[slot, HEAD_MATCH_LENGTH]
    for i in range(OTHERS):
        slots[1 + i] = generations[i] if i < GENERATIONS else places.reference[slot]
        if slots[1 + i] >= 0:
            matched = places.others[slot, i, 1]
            cursors[1 + i, 0], cursors[1 + i, 1] = settle(states, places.others[slot, i, 0], matched), matched
    in_corpora[:] = places.corpora[slot]


@kernel
def put_back(places: Places, slot: int, cursors: Int64, in_corpora: Int32) -> None:
    """Keep the cursors as where the sequence is."""
    places.others[slot] = cursors[1:]
    places.corpora[slot] = in_corpora


@kernel
def advance_own(
    words: Int32, states: Int32, edges: Int32, sequences: Int32, slots: Int64, cursors: Int64, token: int
) -> None:
    """Move the cursor in the own text past a draft token."""
    root = root_of(sequences, slots[0])
    state, matched = advance(words, states, edges, root, cursors[0, 0], cursors[0, 1], token)
    cursors[0, 0], cursors[0, 1] = state, matched


@kernel
def follow_others(
    words: Int32, states: Int32, edges: Int32, sequences: Int32, slots: Int64, cursors: Int64, token: int
) -> None:
    """Move the cursors in the arena's texts but the own one past a token."""
    for i in range(1, 1 + OTHERS):
        if slots[i] >= 0:
            root = root_of(sequences, slots[i])
            state, matched = follow(words, states, edges, root, cursors[i, 0], cursors[i, 1], token)
            cursors[i, 0], cursors[i, 1] = state, matched


@kernel
def gather_own(words: Int32, states: Int32, own: Int32, cursors: Int64, evidence: Int64) -> int:
    """Fill `evidence` with the longest contexts in the own text alone, near or not; return how many there are."""
    return gather(words, states, own, OWN, cursors[0, 0], cursors[0, 1], evidence, 0)


@kernel
def gather_texts(words: Int32, states: Int32, sequences: Int32, slots: Int64, cursors: Int64, evidence: Int64) -> int:
    """Fill `evidence` with the longest contexts in the arena's texts; return how many there are."""
    rows = 0
    for i in range(1 + OTHERS):
        if slots[i] >= 0:
            kind = OWN if i == 0 else RESPONSES if i <= GENERATIONS else REFERENCE
            header = sequences[slots[i]]
            rows = gather(words, states, header, kind, cursors[i, 0], cursors[i, 1], evidence, rows)
            if i == 0:
                for row in range(rows):
                    if header[HEAD_LENGTH] - states[evidence[row, PLACE], RECENT] > NEAR:
                        evidence[row, KIND] = OWN_FAR
    return rows


@kernel
def count_texts(
    words: Int32, states: Int32, edges: Int32, evidence: Int64, rows: int, tokens: Int64, times: Int64
) -> None:
    """Fill `times[j, i]`, int64 `(tokens, MAX_CONTEXTS)`: how often token j followed context i in the arena."""
    for i in range(rows):
        if evidence[i, KIND] < COUNTED and evidence[i, KIND] != CORPUS:
            for j in range(len(tokens)):
                times[j, i] = times_of(words, states, edges, evidence[i], tokens[j])


@kernel
def follow_corpora(corpora: tuple[Automaton, ...], damaged: Int64, in_corpora: Int32, token: int) -> None:
    """Move the cursors in the corpora past a token; `damaged[0]` becomes 1 + the corpus that is damaged, if one is."""
    for i in range(len(in_corpora)):
        text, nodes, edges = corpora[i]
        if index.advance(text, nodes, edges, in_corpora[i], token) == DAMAGED:
            index.to_root(in_corpora[i])
            damaged[0] = 1 + i


@kernel
def gather_corpora(
    corpora: tuple[Automaton, ...], damaged: Int64, in_corpora: Int32, evidence: Int64, rows: int
) -> int:
    """Add the longest contexts in the corpora to `evidence`, after its first `rows`; return how many there are."""
    if len(in_corpora) == 0:
        return rows
    cursor = np.empty(CURSOR_FIELDS, np.int32)
    for i in range(len(in_corpora)):
        if not index.at_root(in_corpora[i]):
            cursor[:] = in_corpora[i]
            rows = _gather_corpus(corpora[i], i, damaged, cursor, evidence, rows)
    return rows


@kernel
def count_corpora(corpora: tuple[Automaton, ...], evidence: Int64, rows: int, tokens: Int64, times: Int64) -> None:
    """As `count_texts`, for the contexts in corpora alone."""
    for i in range(rows):
        if evidence[i, KIND] == CORPUS:
            _, nodes, edges = corpora[evidence[i, TEXT]]
            for j in range(len(tokens)):
                if tokens[j] == evidence[i, LIKELIEST]:
                    times[j, i] = evidence[i, TIMES]
                elif evidence[i, PLACE] == NO_STATE:
                    times[j, i] = 0
                else:
                    _, _, found = index.find_edge(nodes, edges, evidence[i, PLACE], tokens[j])
                    times[j, i] = max(0, found)


@kernel
def _gather_corpus(automaton: Automaton, i: int, damaged: Int64, cursor: Int32, evidence: Int64, rows: int) -> int:
    """Add the longest contexts of corpus i; uses the cursor up.

    A suffix that occurs exactly where a longer one does tells nothing new. There can be many of these, so that only the
    first `SHORTENED` suffixes are looked at.
    """
    text, nodes, edges = automaton
    end = min(rows + CONTEXTS_A_TEXT, len(evidence))
    before = 0
    for _ in range(SHORTENED):
        if rows == end or index.at_root(cursor):
            break
        seen = index.context_count(nodes, cursor)
        token, times = index.likeliest_of(text, nodes, cursor)
        if seen < 1 or times < 1 or token < 0:
            break
        if seen != before:
            evidence[rows, KIND] = CORPUS
            evidence[rows, MATCHED] = cursor[index.AT_LENGTH]
            evidence[rows, SEEN] = seen
            evidence[rows, LIKELIEST] = token
            evidence[rows, TIMES] = times
            # A corpus has no order in which its documents came.
            evidence[rows, LATEST] = NONE
            evidence[rows, PLACE] = cursor[index.AT_NODE] if cursor[index.AT_USED] == 0 else NO_STATE
            evidence[rows, TEXT] = i
            rows += 1
            before = seen
        if index.shorten(text, nodes, edges, cursor) == DAMAGED or index.settle(text, nodes, edges, cursor) == DAMAGED:
            damaged[0] = 1 + i
            break
    return rows

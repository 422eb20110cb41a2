"""The texts that fusion draws on, and a sequence's place in each.

A sequence has its own text; earlier replies, in generations, which all sequences share; a reference of its own, if one
was given; and corpora, mapped from disk. All but the corpora live in one arena of automata, as slots there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins import evidence as columns
from freedraft.plugins.evidence import (
    CONTEXTS_A_TEXT,
    CORPUS,
    NO_STATE,
    OWN,
    REACH,
    REFERENCE,
    RESPONSES,
    advance,
    find_end,
    follow,
    gather,
    root_of,
    settle,
    times_of,
)
from freedraft.plugins.responses import GENERATIONS
from freedraft.retrieval.growth import HEAD_LEARNING, HEAD_LENGTH, HEAD_MATCH, HEAD_MATCH_LENGTH, text_at
from freedraft.retrieval.index import follow as index
from freedraft.retrieval.index.follow import CURSOR_FIELDS, DAMAGED, Automaton
from freedraft.retrieval.index.format import EDGE_FIELDS, NODE_FIELDS, TARGET, TOKEN
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

NONE = -1
OTHERS = GENERATIONS + 1  # texts in the arena beside the own one: the generations, then the reference
THE_REFERENCE = GENERATIONS
SHORTENED = 12


class Texts(NamedTuple):
    """All texts, as kernels read them.

    Attributes:
        words: int32, the arena of the automata.
        states: the same by states, `words.reshape(-1, STATE_WORDS)`.
        edges: the same by edges, `words.reshape(-1, 2)`.
        sequences: int32, the headers of the arena's texts.
        generations: int64 `(GENERATIONS,)`, slots of the earlier replies, `NONE` where there is none.
        corpora: automata of segments; at least one, for kernels know no empty tuple, and as many as a power of two,
            for they are compiled anew for each number: `padded` fills up with automata of nothing.
        damaged: int64 `(1,)`, 1 + the corpus that turned out to be damaged; 0 = none.
    """

    words: Int32
    states: Int32
    edges: Int32
    sequences: Int32
    generations: Int64
    corpora: tuple[Automaton, ...]
    damaged: Int64


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


class Cursors(NamedTuple):
    """Where one sequence, or a draft of it, is in all texts; room that kernels use again and again.

    Attributes:
        slots: int64 `(1 + OTHERS,)`, the slots of its own text and of the others in the arena, or `NONE`.
        places: int64 `(1 + OTHERS, 2)`, state and matched tokens in each.
        corpora: int32 `(corpora, CURSOR_FIELDS)`.
        scratch: int32 `(CURSOR_FIELDS,)`.
    """

    slots: Int64
    places: Int64
    corpora: Int32
    scratch: Int32


def padded(automata: list[Automaton]) -> tuple[Automaton, ...]:
    """`Texts.corpora` for these."""
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
def new_cursors(texts: Texts) -> Cursors:
    """Room for the cursors of one sequence."""
    return Cursors(
        np.empty(1 + OTHERS, np.int64),
        np.empty((1 + OTHERS, 2), np.int64),
        np.empty((len(texts.corpora), CURSOR_FIELDS), np.int32),
        np.empty(CURSOR_FIELDS, np.int32),
    )


@kernel
def begin(texts: Texts, places: Places, slot: int) -> None:
    """Find a sequence's end in the other texts, of which it saw nothing so far. O(`REACH`) a text."""
    own = texts.sequences[slot]
    for i in range(OTHERS):
        other = texts.generations[i] if i < GENERATIONS else places.reference[slot]
        if other >= 0:
            root = root_of(texts.sequences, other)
            state, matched = find_end(texts.words, texts.states, texts.edges, own, root)
            places.others[slot, i, 0], places.others[slot, i, 1] = state, matched
    for i in range(len(texts.corpora)):
        cursor = places.corpora[slot, i]
        index.to_root(cursor)
        if own[HEAD_LEARNING] != 0:
            for position in range(max(0, own[HEAD_LENGTH] - REACH), own[HEAD_LENGTH]):
                _advance_in_corpus(texts, i, cursor, text_at(texts.words, own, position))


@kernel
def take_up(texts: Texts, places: Places, slot: int, at: Cursors) -> None:
    """Set the cursors to where a sequence is."""
    at.slots[0] = slot
    read_own(texts, at)
    for i in range(OTHERS):
        other = texts.generations[i] if i < GENERATIONS else places.reference[slot]
        at.slots[1 + i] = other
        if other >= 0:
            matched = places.others[slot, i, 1]
            at.places[1 + i, 0] = settle(texts.states, places.others[slot, i, 0], matched)
            at.places[1 + i, 1] = matched
    at.corpora[:] = places.corpora[slot]


@kernel
def read_own(texts: Texts, at: Cursors) -> None:
    """Set the cursor in the own text to its end, where the automaton keeps the match."""
    own = texts.sequences[at.slots[0]]
    at.places[0, 0], at.places[0, 1] = own[HEAD_MATCH], own[HEAD_MATCH_LENGTH]


@kernel
def put_back(places: Places, slot: int, at: Cursors) -> None:
    """Keep the cursors as where the sequence is."""
    places.others[slot] = at.places[1:]
    places.corpora[slot] = at.corpora


@kernel
def advance_own(texts: Texts, at: Cursors, token: int) -> None:
    """Move the cursor in the own text past a draft token."""
    root = root_of(texts.sequences, at.slots[0])
    state, matched = advance(texts.words, texts.states, texts.edges, root, at.places[0, 0], at.places[0, 1], token)
    at.places[0, 0], at.places[0, 1] = state, matched


@kernel
def follow_others(texts: Texts, at: Cursors, token: int) -> None:
    """Move the cursors in all texts but the own one past a token."""
    for i in range(1, 1 + OTHERS):
        if at.slots[i] >= 0:
            root = root_of(texts.sequences, at.slots[i])
            state, matched = follow(
                texts.words, texts.states, texts.edges, root, at.places[i, 0], at.places[i, 1], token
            )
            at.places[i, 0], at.places[i, 1] = state, matched
    for i in range(len(texts.corpora)):
        _advance_in_corpus(texts, i, at.corpora[i], token)


@kernel
def gather_all(texts: Texts, at: Cursors, evidence: Int64) -> int:
    """Fill `evidence` with the longest contexts in each text; return how many there are."""
    rows = 0
    for i in range(1 + OTHERS):
        if at.slots[i] >= 0:
            kind = OWN if i == 0 else REFERENCE if i == 1 + THE_REFERENCE else RESPONSES
            header = texts.sequences[at.slots[i]]
            rows = gather(texts.words, texts.states, header, kind, at.places[i, 0], at.places[i, 1], evidence, rows)
    for i in range(len(texts.corpora)):
        if not index.at_root(at.corpora[i]):
            at.scratch[:] = at.corpora[i]
            rows = _gather_in_corpus(texts, i, at.scratch, evidence, rows)
    return rows


@kernel
def times_in(texts: Texts, context: Int64, token: int) -> int:
    """How often `token` followed a context, one row of evidence."""
    if context[columns.KIND] != CORPUS:
        return times_of(texts.words, texts.states, texts.edges, context, token)
    if context[columns.LIKELIEST] == token:
        return context[columns.TIMES]
    if context[columns.PLACE] == NO_STATE:
        return 0
    _, _, times = index.find_edge(texts.corpora[context[columns.TEXT]], context[columns.PLACE], token)
    return max(0, times)


@kernel
def _advance_in_corpus(texts: Texts, i: int, cursor: Int32, token: int) -> None:
    if index.advance(texts.corpora[i], cursor, token) == DAMAGED:
        index.to_root(cursor)
        texts.damaged[0] = 1 + i


@kernel
def _gather_in_corpus(texts: Texts, i: int, cursor: Int32, evidence: Int64, rows: int) -> int:
    """Add the longest contexts of a corpus to `evidence`, after its first `rows`; uses the cursor up.

    A suffix that occurs exactly where a longer one does tells nothing new. There can be many of these, so that only the
    first `SHORTENED` suffixes are looked at.
    """
    automaton = texts.corpora[i]
    end = min(rows + CONTEXTS_A_TEXT, len(evidence))
    before = 0
    for _ in range(SHORTENED):
        if rows == end or index.at_root(cursor):
            break
        seen = index.context_count(automaton, cursor)
        token, times = index.likeliest_of(automaton, cursor)
        if seen < 1 or times < 1 or token < 0:
            break
        if seen != before:
            rows = _add_row(i, cursor, seen, token, times, evidence, rows)
            before = seen
        if index.shorten(automaton, cursor) == DAMAGED or index.settle(automaton, cursor) == DAMAGED:
            texts.damaged[0] = 1 + i
            break
    return rows


@kernel
def _add_row(i: int, cursor: Int32, seen: int, token: int, times: int, evidence: Int64, rows: int) -> int:
    row = evidence[rows]
    row[columns.KIND] = CORPUS
    row[columns.MATCHED] = cursor[index.AT_LENGTH]
    row[columns.SEEN] = seen
    row[columns.LIKELIEST] = token
    row[columns.TIMES] = times
    # A corpus has no order in which its documents came.
    row[columns.LATEST] = NONE
    row[columns.PLACE] = cursor[index.AT_NODE] if cursor[index.AT_USED] == 0 else NO_STATE
    row[columns.TEXT] = i
    return rows + 1

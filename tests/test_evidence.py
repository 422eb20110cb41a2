"""Cursors and contexts against the naive reference: in the own text, in others, and in others that grow."""

from __future__ import annotations

import naive
import numpy as np
import strategies
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from freedraft.plugins.evidence import (
    COLUMNS,
    CONTEXTS_A_TEXT,
    LATEST,
    LIKELIEST,
    MATCHED,
    MAX_CONTEXTS,
    OWN,
    REACH,
    SEEN,
    TIMES,
    advance,
    empty_evidence,
    find_end,
    follow,
    gather,
    root_of,
    settle,
    times_of,
)
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.edges import STATE_WORDS
from freedraft.retrieval.growth import CHAIN_CAP
from freedraft.retrieval.ragged import ragged


class Text:
    """A text in an automaton, and a cursor in it."""

    def __init__(self, tokens, move=advance):
        self.automata = SuffixAutomata(memory=4 * 2**20)
        self.slots = self.automata.open(*ragged([tokens]))
        self.move = move
        self.state, self.matched = self.root, 0

    @property
    def parts(self):
        words, sequences = self.automata.arrays
        return words, words.reshape(-1, STATE_WORDS), words.reshape(-1, 2), sequences[self.slots[0]]

    @property
    def root(self):
        return root_of(self.automata.arrays.sequences, self.slots[0])

    def follow(self, tokens):
        words, states, edges, _ = self.parts
        for token in tokens:
            self.state, self.matched = self.move(words, states, edges, self.root, self.state, self.matched, token)

    def grow(self, tokens):
        self.automata.extend(self.slots, *ragged([tokens]))
        self.state = settle(self.parts[1], self.state, self.matched)

    def evidence(self):
        words, states, _, header = self.parts
        rows = empty_evidence()
        return rows[: gather(words, states, header, OWN, self.state, self.matched, rows, 0)]

    def times(self, row, token):
        words, states, edges, _ = self.parts
        return times_of(words, states, edges, row, token)


def assert_same(text, expected):
    rows = text.evidence()
    assert [(row[MATCHED], row[SEEN], row[LIKELIEST], row[TIMES], row[LATEST]) for row in rows.tolist()] == [
        (c.length, len(c.followed), c.likeliest, c.times(c.likeliest), c.followed[-1]) for c in expected
    ]
    for row, context in zip(rows, expected, strict=True):
        for token in (*context.followed, 10**9):
            assert text.times(row, token) == context.times(token)


def shallow(*texts):
    """Counts are exact only up to a depth of nested contexts."""
    assume(all(len(naive.contexts(text[:n])) < CHAIN_CAP for text in texts for n in range(len(text) + 1)))


@given(strategies.texts(max_size=40), strategies.texts(max_size=30))
@settings(max_examples=200)
def test_contexts_in_another_text(learnt, before):
    shallow(learnt)
    text = Text(learnt)
    text.follow(before)
    assert text.matched == naive.match_in(learnt, before)
    assert_same(text, naive.evidence_in(OWN, learnt, before, CONTEXTS_A_TEXT))


@given(st.data())
@settings(max_examples=200)
def test_a_cursor_in_a_text_that_grows(data):
    """It may have lost sight of a longer match that the growth brought, but what it has is counted right."""
    learnt = data.draw(strategies.texts(max_size=30))
    more = data.draw(strategies.texts(max_size=30))
    before = (learnt + more)[: data.draw(st.integers(0, 60))]
    shallow(learnt + more)
    text = Text(learnt)
    text.follow(before)
    text.grow(more)
    assert text.matched == naive.match_in(learnt, before)
    cut = before[len(before) - text.matched :]
    assert_same(text, naive.evidence_in(OWN, learnt + more, cut, CONTEXTS_A_TEXT))
    text.follow([1, 2])
    assert text.matched == naive.match_in(learnt + more, [*cut, 1, 2])


@given(strategies.texts(max_size=60), st.integers(60, 150))
@settings(max_examples=60)
def test_a_match_reaches_back_no_further_than_it_may(learnt, length):
    text = Text(learnt * 3, follow)
    before = (learnt * 3)[:length]
    text.follow(before)
    assert text.matched == naive.match_in(learnt * 3, before[-REACH:]) <= REACH
    states = text.parts[1]
    assert text.state == settle(states, text.state, text.matched)


@given(strategies.texts(max_size=60), strategies.texts(max_size=60))
@settings(max_examples=100)
def test_the_end_is_found_as_if_all_had_been_followed(learnt, own):
    automata = SuffixAutomata(memory=4 * 2**20)
    slots = automata.open(*ragged([learnt, own]))
    words, sequences = automata.arrays
    states, edges = words.reshape(-1, STATE_WORDS), words.reshape(-1, 2)
    root = root_of(sequences, slots[0])
    state, matched = root, 0
    for token in own:
        state, matched = follow(words, states, edges, root, state, matched, token)
    assert find_end(words, states, edges, sequences[slots[1]], root) == (state, matched)


def test_a_text_that_stopped_learning_has_no_end_to_find():
    automata = SuffixAutomata(memory=4 * 2**20, max_length=100)
    slots = automata.open(*ragged([[1, 2, 3], [1, 2, 3] * 2000, [1, 2, 3, 1, 2]]))
    assert automata.learning(slots).tolist() == [True, False, True]
    words, sequences = automata.arrays
    states, edges = words.reshape(-1, STATE_WORDS), words.reshape(-1, 2)
    root = root_of(sequences, slots[0])
    assert find_end(words, states, edges, sequences[slots[1]], root) == (root, 0)
    assert find_end(words, states, edges, sequences[slots[2]], root)[1] == 2


def test_evidence_never_overflows_its_room():
    text = Text([1, 2, 3] * 9)
    text.follow([1, 2, 3] * 3)
    words, states, _, header = text.parts
    rows = np.zeros((MAX_CONTEXTS, COLUMNS), np.int64)
    used = 0
    for _ in range(20):
        used = gather(words, states, header, OWN, text.state, text.matched, rows, used)
    assert used == MAX_CONTEXTS

"""Several texts that grow side by side in one automaton, against a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.contexts import likeliest_times
from freedraft.retrieval.edges import COUNT, LENGTH, NO_TOKEN, RECENT, STATE_WORDS, TOKEN, find_edge
from freedraft.retrieval.growth import HEAD_LENGTH, HEAD_ROOT, learn_strand
from freedraft.retrieval.ragged import ragged

STRANDS = 3
LONGEST = 7


class Strands:
    """The automaton, and what was appended: (strand, token), in order."""

    def __init__(self, memory=2**20, **bounds):
        self.automata = SuffixAutomata(memory=memory, **bounds)
        self.slot = int(self.automata.open(*ragged([[]]))[0])
        self.ends = [self.root] * STRANDS
        self.texts = [[] for _ in range(STRANDS)]
        self.followed = {}

    @property
    def header(self):
        return self.automata._sequences[self.slot]

    @property
    def root(self):
        return int(self.header[HEAD_ROOT])

    @property
    def arrays(self):
        words = self.automata._words
        return words, words.reshape(-1, STATE_WORDS), words.reshape(-1, 2)

    def append(self, strand, token):
        grown = self.automata
        end = learn_strand(*self.arrays, grown._pool, grown._next_page, self.header, self.ends[strand], token)
        if end:
            self.ends[strand] = int(end)
            text = self.texts[strand]
            for start in range(max(0, len(text) - LONGEST), len(text)):
                self.followed.setdefault(tuple(text[start:]), []).append(token)
            text.append(token)
        return bool(end)

    def state(self, string):
        words, states, edges = self.arrays
        state = self.root
        for token in string:
            state = find_edge(words, states, edges, state, token)
            if state == 0:
                return 0
        return state

    def substrings(self):
        return {
            tuple(text[start:end])
            for text in self.texts
            for start in range(len(text))
            for end in range(start + 1, min(len(text), start + LONGEST) + 1)
        }


def check(made):
    """Every context is known, with how often it was followed, by what last, and by what most often."""
    _, states, _ = made.arrays
    for string in made.substrings():
        state = made.state(string)
        assert state != 0
        after = made.followed.get(string, [])
        assert states[state, COUNT] == len(after)
        if not after:
            assert states[state, TOKEN] == NO_TOKEN
            continue
        assert states[state, RECENT] == after[-1]
        token = int(states[state, TOKEN])
        # Where other texts ended when it came last, these occurrences were not counted.
        times = likeliest_times(states, made.header, state)
        assert max(1, after.count(token) - (STRANDS - 1)) <= times <= after.count(token)
    for text, end in zip(made.texts, made.ends, strict=True):
        assert states[end, LENGTH] == len(text)


@given(st.lists(st.tuples(st.integers(0, STRANDS - 1), st.integers(0, 2)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_texts_side_by_side_are_counted_together(appended):
    made = Strands()
    for strand, token in appended:
        assert made.append(strand, token)
    check(made)
    assert made.header[HEAD_LENGTH] == len(appended)
    assert made.state((0, 1, 2, 9)) == 0


@given(st.lists(st.integers(0, 2), max_size=25), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_equal_texts_in_step_with_one_another(text, apart):
    """As replies to one prompt are: at every place all of them go on with the same token."""
    made = Strands()
    for i in range(len(text) + apart * STRANDS):
        for strand in range(STRANDS):
            place = i - apart * strand
            if 0 <= place < len(text):
                made.append(strand, text[place])
    check(made)


def test_texts_in_lockstep_leave_nothing_that_looks_unlikely():
    made = Strands()
    text = [5, 6, 7, 8, 9, 10]
    for token in text:
        for strand in range(STRANDS):
            made.append(strand, token)
    _, states, _ = made.arrays
    for length in range(1, len(text)):
        state = made.state(text[:length])
        assert states[state, COUNT] == STRANDS
        assert likeliest_times(states, made.header, state) == STRANDS


def test_a_strand_alone_is_a_text():
    made = Strands()
    source = np.random.default_rng(3)
    text = source.integers(0, 4, 300).tolist()
    slots = made.automata.open(*ragged([[]]))
    for token in text:
        made.append(0, token)
        made.automata.extend(slots, *ragged([[token]]))
    _, states, _ = made.arrays
    contexts = made.automata.contexts(slots)
    for length, count, likeliest, times, recent in zip(
        *(getattr(contexts, name)[0] for name in ("length", "count", "likeliest", "times", "recent")), strict=True
    ):
        if length <= 0:
            break
        state = made.state(text[-length:])
        assert states[state, COUNT] == count
        assert states[state, TOKEN] == likeliest
        assert likeliest_times(states, made.header, state) == times
        assert states[state, RECENT] == recent


@pytest.mark.parametrize("bounds", [{"memory": 2**16}, {"max_length": 40}])
def test_it_ends_where_there_is_no_room(bounds):
    made = Strands(**bounds)
    source = np.random.default_rng(0)
    known = 0
    for i in range(20_000):
        if not made.append(i % STRANDS, int(source.integers(0, 10_000))):
            break
        known += 1
    assert 0 < known < 20_000
    assert made.header[HEAD_LENGTH] == known
    for strand in range(STRANDS):
        assert not made.append(strand, 1)
    _, states, _ = made.arrays
    for string in made.substrings():
        # The last token of an automaton that found no room half-way may lack edges.
        state = made.state(string)
        assert state != 0 or string[-1:] == tuple(made.texts[(known - 1) % STRANDS][-1:])
        assert states[state, COUNT] <= len(made.followed.get(string, []))

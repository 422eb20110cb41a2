"""Earlier replies in two generations: what goes in, when they turn over, how much they hold."""

from __future__ import annotations

import numpy as np
import pytest

from freedraft.plugins.evidence import SEPARATOR
from freedraft.plugins.responses import (
    AT_ONCE,
    GENERATIONS,
    NONE,
    Responses,
    TakenIn,
    copy_text,
    take_in,
)
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.edges import COUNT, STATE_WORDS, find_edge
from freedraft.retrieval.growth import HEAD_LENGTH, HEAD_ROOT
from freedraft.retrieval.ragged import ragged


@pytest.fixture
def automata():
    return SuffixAutomata(memory=8 * 2**20)


@pytest.fixture
def taken_in():
    return TakenIn(np.full(16, NONE), np.zeros(16, np.int64))


def arrays(automata):
    words = automata._words
    return words, words.reshape(-1, STATE_WORDS), words.reshape(-1, 2)


def times(automata, slot, string):
    """How often a string comes in a generation with a token, or an end, after it; None where it never comes."""
    state = automata._sequences[slot, HEAD_ROOT] if slot != NONE else 0
    for token in string:
        state = find_edge(*arrays(automata), state, token) if state else 0
    return int(arrays(automata)[1][state, COUNT]) if state else None


def tokens(automata, slot):
    return 0 if slot == NONE else int(automata._sequences[slot, HEAD_LENGTH])


def add(automata, responses, taken_in, text, start):
    slots = automata.open(*ragged([text]))
    responses.add(slots, np.array([start]), taken_in)
    automata.close(slots)


def write(automata, responses, taken_in, slot, start, most=AT_ONCE):
    """What is done behind a step while a reply is written."""
    take_in(
        *arrays(automata), automata._pool, automata._next_page, automata._sequences, int(responses.slots[0]), slot,
        start, taken_in, most,
    )  # fmt: skip


def test_replies_are_kept_apart_and_without_their_prompts(automata, taken_in):
    responses = Responses(automata, 1000)
    add(automata, responses, taken_in, [1, 2, 3, 4], 2)
    add(automata, responses, taken_in, [3, 4, 6], 0)
    young = responses.slots[0]
    assert times(automata, young, [3, 4]) == 2
    assert times(automata, young, [3, 4, 6]) == 1
    assert times(automata, young, [3, 4, 6, SEPARATOR]) == 0
    assert times(automata, young, [3, 4, SEPARATOR]) == 0
    assert times(automata, young, [4, 3]) is None
    assert times(automata, young, [2]) is None
    assert tokens(automata, young) == 7


def test_what_never_started_or_is_empty_is_left_out(automata, taken_in):
    responses = Responses(automata, 1000)
    add(automata, responses, taken_in, [1, 2, 3], -1)
    add(automata, responses, taken_in, [1, 2, 3], 3)
    assert tokens(automata, responses.slots[0]) == 0


def test_a_reply_is_taken_in_while_it_is_written_and_once(automata, taken_in):
    responses = Responses(automata, 1000)
    young = responses.slots[0]
    slots = automata.open(*ragged([[9, 1, 2, 3]]))
    slot = int(slots[0])
    write(automata, responses, taken_in, slot, 1)
    assert times(automata, young, [1, 2]) == 1
    assert times(automata, young, [1, 2, 3]) == 0
    automata.extend(slots, *ragged([[4, 5, 6]]))
    write(automata, responses, taken_in, slot, 1, most=2)
    assert times(automata, young, [3, 4]) == 1
    assert times(automata, young, [5, 6]) is None
    responses.add(slots, np.array([1]), taken_in)
    assert times(automata, young, [5, 6]) == 1
    assert times(automata, young, [1, 2, 3, 4, 5, 6]) == 1
    assert tokens(automata, young) == 7
    # The sequence's next reply is another.
    automata.extend(slots, *ragged([[7, 8]]))
    responses.add(slots, np.array([7]), taken_in)
    assert times(automata, young, [6, 8]) is None
    assert times(automata, young, [8]) == 1


def test_replies_that_are_written_at_once_go_on_in_the_next_generation(automata, taken_in):
    responses = Responses(automata, 4)
    slots = automata.open(*ragged([[1, 2], [1, 3]]))
    for i in range(3):
        automata.extend(slots, *ragged([[4 + i], [5 + i]]))
        for slot in slots.tolist():
            write(automata, responses, taken_in, slot, 0)
        assert responses.full == (tokens(automata, responses.slots[0]) >= 4)
        responses.rotate(taken_in)
    young, old = responses.slots
    assert tokens(automata, young) == 0
    assert times(automata, old, [5, 6]) == 0
    automata.extend(slots, *ragged([[9], [9]]))
    responses.add(slots, np.zeros(2, np.int64), taken_in)
    assert times(automata, young, [9]) == 2
    assert times(automata, young, [6, 9]) is None


def test_generations_turn_over_when_the_young_one_is_full(automata, taken_in):
    responses = Responses(automata, 10)
    for token in range(1, 9):
        add(automata, responses, taken_in, [token] * 4, 0)
        young, old = responses.slots.copy()
        full = tokens(automata, young) >= 10
        assert responses.rotate(taken_in) == full
        if full:
            assert tokens(automata, responses.slots[0]) == 0
            assert responses.slots[1] == young
        else:
            assert responses.slots.tolist() == [young, old]
    # Two replies a generation: the last turn was after the 8th, and the old generation has the 7th and 8th.
    assert [times(automata, responses.slots[1], [token] * 4) for token in (6, 7, 8)] == [None, 1, 1]


def test_the_oldest_gives_its_memory_back(automata, taken_in):
    responses = Responses(automata, 10)
    used = []
    for _ in range(12):
        add(automata, responses, taken_in, list(range(12)), 0)
        responses.rotate(taken_in)
        used.append(automata.memory_used)
    assert len(set(used[3:])) == 1


def test_a_young_generation_that_found_no_memory_turns_over(taken_in):
    automata = SuffixAutomata(memory=2**17)
    responses = Responses(automata, 10**6)
    source = np.random.default_rng(0)
    for _ in range(30):
        add(automata, responses, taken_in, source.integers(0, 999, 200).tolist(), 0)
        responses.rotate(taken_in)
    assert responses.slots[1] != NONE
    assert automata.memory_used <= 2**17


@pytest.mark.parametrize("what", ["memory", "texts"])
def test_a_generation_is_kept_where_there_is_no_room_for_another(taken_in, what):
    automata = SuffixAutomata(memory=2**17)
    responses = Responses(automata, 10)
    add(automata, responses, taken_in, [1] * 20, 0)
    young = responses.slots[0]
    if what == "memory":
        held = automata.open(*ragged([np.random.default_rng(0).integers(0, 99, 50_000).tolist()]))
    else:
        held = automata.open(*ragged([[]] * (2**17 // 2**14 - 1)))
    assert not responses.rotate(taken_in)
    assert responses.slots.tolist() == [young, NONE]
    assert times(automata, young, [1] * 5) == 16
    automata.close(held)
    assert responses.rotate(taken_in)
    assert responses.slots[1] == young


def test_none_are_kept_when_there_is_no_room(automata, taken_in):
    responses = Responses(automata, 0)
    assert not responses.enabled
    assert not responses.full
    assert responses.slots.tolist() == [NONE] * GENERATIONS
    assert not responses.rotate(taken_in)
    assert automata.memory_used == 0


def test_cursors_begin_at_the_roots(automata, taken_in):
    responses = Responses(automata, 10)
    add(automata, responses, taken_in, [1] * 20, 0)
    responses.rotate(taken_in)
    roots = automata.arrays.sequences[responses.slots, HEAD_ROOT]
    assert responses.beginning.tolist() == [[roots[0], 0], [roots[1], 0]]


@pytest.mark.parametrize("slot", [-1, 10**6])
def test_no_text_is_copied_from_out_of_range(automata, slot):
    held = automata.arrays
    assert not len(copy_text(held.words, held.sequences, slot, 0))

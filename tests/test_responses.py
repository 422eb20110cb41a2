"""Earlier replies in two generations: what goes in, when they turn over, how much they hold."""

from __future__ import annotations

import numpy as np
import pytest

from freedraft.plugins.evidence import SEPARATOR
from freedraft.plugins.responses import GENERATIONS, NONE, Responses, copy_text
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.growth import HEAD_ROOT
from freedraft.retrieval.ragged import ragged


@pytest.fixture
def automata():
    return SuffixAutomata(memory=8 * 2**20)


def held(automata, slot):
    """The whole text of a slot."""
    if slot == NONE:
        return []
    arrays = automata.arrays
    return copy_text(arrays.words, arrays.sequences, slot, 0).tolist()[:-1]


def add(automata, responses, text, start):
    slots = automata.open(*ragged([text]))
    responses.add(slots, np.array([start]))
    automata.close(slots)


def test_replies_are_kept_with_a_separator_after_each(automata):
    responses = Responses(automata, 1000)
    add(automata, responses, [1, 2, 3, 4], 2)
    add(automata, responses, [5, 6], 0)
    assert held(automata, responses.slots[0]) == [3, 4, SEPARATOR, 5, 6, SEPARATOR]


def test_what_never_started_or_is_empty_is_left_out(automata):
    responses = Responses(automata, 1000)
    add(automata, responses, [1, 2, 3], -1)
    add(automata, responses, [1, 2, 3], 3)
    assert held(automata, responses.slots[0]) == []


def test_generations_turn_over_when_the_young_one_is_full(automata):
    responses = Responses(automata, 10)
    for token in range(1, 9):
        add(automata, responses, [token] * 4, 0)
        young, old = (held(automata, slot) for slot in responses.slots)
        turned = responses.rotate()
        assert turned == (len(young) >= 10)
        if turned:
            assert held(automata, responses.slots[0]) == []
            assert held(automata, responses.slots[1]) == young
        else:
            assert held(automata, responses.slots[1]) == old
    # Two replies a generation: the last turn was after the 8th, and the old generation has the 7th and 8th.
    assert held(automata, responses.slots[1]) == [7] * 4 + [SEPARATOR] + [8] * 4 + [SEPARATOR]


def test_the_oldest_gives_its_memory_back(automata):
    responses = Responses(automata, 10)
    used = []
    for _ in range(12):
        add(automata, responses, list(range(12)), 0)
        responses.rotate()
        used.append(automata.memory_used)
    assert len(set(used[3:])) == 1


def test_a_young_generation_that_found_no_memory_turns_over():
    automata = SuffixAutomata(memory=2**17)
    responses = Responses(automata, 10**6)
    source = np.random.default_rng(0)
    for _ in range(30):
        add(automata, responses, source.integers(0, 999, 200).tolist(), 0)
        responses.rotate()
    assert responses.slots[1] != NONE
    assert automata.memory_used <= 2**17


def test_none_are_kept_when_there_is_no_room(automata):
    responses = Responses(automata, 0)
    assert not responses.enabled
    assert responses.slots.tolist() == [NONE] * GENERATIONS
    assert not responses.rotate()
    assert automata.memory_used == 0


def test_cursors_begin_at_the_roots(automata):
    responses = Responses(automata, 10)
    add(automata, responses, [1] * 20, 0)
    responses.rotate()
    roots = automata.arrays.sequences[responses.slots, HEAD_ROOT]
    assert responses.beginning.tolist() == [[roots[0], 0], [roots[1], 0]]


@pytest.mark.parametrize("slot", [-1, 10**6])
def test_no_text_is_copied_from_out_of_range(automata, slot):
    arrays = automata.arrays
    assert not len(copy_text(arrays.words, arrays.sequences, slot, 0))

"""Jacobi decoding: the iterates are those of the definition, and the text is that of plain decoding."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Decoding, RankingTarget

from freedraft.integrations.hf import Speculative
from freedraft.plugins.base import Feedback
from freedraft.plugins.guesses import SAMPLE
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.ragged import ragged

one_thread = tiny.one_thread


def drafter(**options: Any) -> Any:
    return make_drafter("jacobi", options)


class CountingTarget(RankingTarget):
    """Commits the length of the text, whatever the text is, modulo its vocabulary."""

    def ranking(self, text: Any) -> list[int]:
        return [(len(text) + i) % self.vocabulary for i in range(self.vocabulary)]


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 14), st.sampled_from(["prompt", "random"]))
@settings(max_examples=60)
def test_equals_naive(seed: int, most: int, budget: int, initial: str) -> None:
    prompts = [[1, 2, 3, 4, 3], [2], [4] * 70 + [3]]
    decoding = Decoding(drafter(max_tokens=most, initial=initial), RankingTarget(seed, vocabulary=6), prompts)
    highest = 4
    iterates: list[list[int]] = [[], [], []]
    for _ in range(8):
        before = [list(text) for text in decoding.texts]
        told, committed = decoding.step(budget)
        for i, nodes in enumerate(decoding.drafts):
            sample = prompts[i][-SAMPLE:]
            # The sample is a ring: a long prompt's tokens begin in the middle.
            turn = len(prompts[i]) % SAMPLE if len(prompts[i]) > SAMPLE else 0
            sample = sample[len(sample) - turn :] + sample[: len(sample) - turn]
            any_token = highest if initial == "random" else None
            expected = iterates[i] + [
                naive.initial_guess(sample, len(before[i]), place, any_token)
                for place in range(len(iterates[i]), min(budget, most))
            ]
            assert nodes == [(token, place - 1) for place, token in enumerate(expected)]
            argmax = told[i].argmax
            assert argmax is not None
            iterates[i] = naive.jacobi_iterate(argmax.tolist(), len(committed[i]))[: min(budget, most)]
        highest = max(highest, *(max(new) for new in committed))


def test_one_pass_settles_what_depends_on_no_guess() -> None:
    decoding = Decoding(drafter(max_tokens=8, initial="random"), CountingTarget(0, vocabulary=100), [[50, 60, 70]])
    decoding.step(8)
    first = len(decoding.texts[0])
    assert [token for token, _ in decoding.drafts[0]] != list(range(3, 11))
    _, committed = decoding.step(8)
    # Every argmax of the first pass was right: the iterate of 7 places is accepted whole.
    assert len(committed[0]) >= 8 - (first - 3) + 1
    decoding.run(60, 8)
    assert decoding.tokens_per_step > 4


def test_a_token_that_depends_on_the_one_before_settles_one_a_pass() -> None:
    decoding = Decoding(drafter(initial="random"), RankingTarget(1, vocabulary=1000, order=1), [[999, 5]])
    decoding.run(30, 8)
    # The worst case of the method: never worse than plain decoding.
    assert 1.0 <= decoding.tokens_per_step < 1.5


def test_initial_guesses_of_another_drafter() -> None:
    made = drafter(initial="prompt_lookup", initial_settings={"min_match": 2}, max_tokens=4)
    slots = made.open(*ragged([[1, 2, 3, 4, 5, 1, 2], [7]]))
    drafts = made.draft(slots, np.array([4, 2], np.int32))
    assert drafts.tokens.tolist() == [3, 4, 5, 1, 7, 7]
    made.observe(slots, Feedback(np.zeros(2, np.int32), np.array([0, 5, 8]), np.arange(20, 28, dtype=np.int32)))
    made.extend(slots, *ragged([[1], [2]]))
    drafts = made.draft(slots, np.array([4, 4], np.int32))
    # The iterates, and behind the shorter one what its prompt has.
    assert drafts.tokens.tolist() == [21, 22, 23, 24, 26, 27, 7, 7]
    made.close(slots)


def test_positions_that_were_not_verified_have_no_iterate() -> None:
    made = drafter(max_tokens=4)
    slots = made.open(*ragged([[9, 9]]))
    made.draft(slots, np.array([4], np.int32))
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 5]), np.array([1, 2, -1, 4, 5], np.int32)))
    made.extend(slots, *ragged([[1]]))
    assert made.draft(slots, np.array([4], np.int32)).tokens.tolist() == [2, 9, 9, 9]
    # Committed without feedback: the iterate was about other places.
    made.extend(slots, *ragged([[2, 3]]))
    assert made.draft(slots, np.array([4], np.int32)).tokens.tolist() == [9, 9, 9, 9]


def test_probabilities_follow_what_is_right() -> None:
    decoding = Decoding(drafter(max_tokens=6), CountingTarget(0, vocabulary=50), [[1, 2]])
    decoding.run(300, 6)
    assert decoding.probability[0][0] > 0.8
    lost = Decoding(drafter(max_tokens=6), RankingTarget(1, vocabulary=1000, order=1), [[1, 2]])
    lost.run(100, 6)
    assert lost.probability[0][0] < 0.2


def test_mistakes_are_told() -> None:
    for options, message in (
        ({"initial": "token_recycling"}, "needs feedback"),
        ({"initial": "nothing"}, "unknown drafter"),
        ({"initial_settings": {"min_match": 2}}, "initial_settings are for a drafter"),
    ):
        with pytest.raises(ConfigError, match=message):
            drafter(**options)
    made = drafter()
    slots = made.open(*ragged([[1], [2]]))
    with pytest.raises(InputError, match="needs argmax"):
        made.observe(slots, Feedback(np.zeros(2, np.int32), np.array([0, 1, 2])))
    with pytest.raises(InputError, match="one a slot"):
        made.draft(slots, np.array([1], np.int32))
    made.close(slots)
    with pytest.raises(InputError, match="open"):
        made.extend(slots, *ragged([[1], [1]]))


@pytest.mark.parametrize("initial", ["prompt", "random", "prompt_lookup"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7}])
def test_generate_is_lossless(initial: str, options: dict[str, Any]) -> None:
    model, prompt = tiny.model(), tiny.prompt(20)
    expected = tiny.plain(model, prompt, 3, max_new_tokens=60, **options)
    ours = Speculative("jacobi", initial=initial)
    assert tiny.speculative(model, prompt, ours, 3, max_new_tokens=60, **options).tolist() == expected.tolist()
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.drafted > 60

"""`generate(..., reference=...)`: a predicted output saves steps and never changes the text."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from freedraft.integrations.hf import Speculative
from freedraft.integrations.hf.reference import as_references
from freedraft.retrieval.errors import InputError, UnsupportedError

one_thread = tiny.one_thread
LENGTH = 40


def steps_with(which: Any, ids: torch.Tensor, reference: Any, **options: Any) -> int:
    """Steps of `generate` with fusion; the text must be plain's."""
    ours = Speculative("fusion", pacing="off", scope="off", tokenizer=tiny.tokenizer())
    expected = tiny.plain(which, ids, max_new_tokens=LENGTH, **options)
    actual = tiny.speculative(which, ids, ours, max_new_tokens=LENGTH, reference=reference, **options)
    assert actual.equal(expected)
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    return ours.statistics.steps


def test_the_truth_saves_most_steps_and_a_near_truth_many() -> None:
    which, ids = tiny.model(), tiny.prompt(30)
    truth = tiny.plain(which, ids, max_new_tokens=LENGTH)[0, 30:]
    edited = truth.tolist()
    edited[20] = 3
    least = steps_with(which, ids, truth)
    assert least < LENGTH / 3
    assert least <= steps_with(which, ids, edited) < LENGTH / 2
    assert steps_with(which, ids, tiny.tokenizer().decode(truth)) == least


def test_nonsense_changes_nothing() -> None:
    which, ids = tiny.model(), tiny.prompt(30)
    assert steps_with(which, ids, [5] * 100) <= LENGTH
    assert steps_with(which, ids, "") <= LENGTH
    assert steps_with(which, ids, tiny.prompt(300, seed=4)[0]) <= LENGTH


def test_one_a_prompt_or_one_for_all() -> None:
    which = tiny.model()
    ids = torch.cat([tiny.prompt(30), tiny.prompt(30, seed=1)])
    truths = tiny.plain(which, ids, max_new_tokens=LENGTH)[:, 30:]
    both = steps_with(which, ids, truths)
    one = steps_with(which, ids, [truths[0], None])
    none = steps_with(which, ids, None)
    assert both < one < none
    assert steps_with(which, ids, truths[0]) < none


def test_several_sequences_a_prompt_share_it() -> None:
    texts = as_references([[1, 2], "c"], 4, tiny.tokenizer())
    assert [text.tolist() for text in texts] == [[1, 2], [1, 2], [2], [2]]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ([[1], [2], [3]], "one a prompt, got 3 for 2 rows"),
        ([0.5], "integer token ids"),
        ([-1], "token ids must be in"),
        ("abc", "needs the model's tokenizer"),
        (["abc", None], "needs the model's tokenizer"),
    ],
)
def test_what_is_refused(reference: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_references(reference, 2, None)


def test_a_drafter_that_takes_none_says_so() -> None:
    with pytest.raises(UnsupportedError, match="SuffixAutomaton takes none; fusion does"):
        tiny.speculative(tiny.model(), tiny.prompt(), Speculative("suffix_automaton"), reference=[1])

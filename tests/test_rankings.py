"""Fusion with what the target ranked: a guess where no text has one, learnt without looking ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from freedraft.integrations.hf import Speculative
from freedraft.plugins.base import Feedback, Source
from freedraft.plugins.evidence import KINDS, RANKED
from freedraft.plugins.mixing import RATES
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import ragged

one_thread = tiny.one_thread
CHAIN = {10: 20, 20: 30, 30: 40, 40: 50}
"""The target's likeliest token after each."""


def fusion(**options):
    return make_drafter(
        "fusion", {"memory": "8MiB", "min_probability": 0, "max_tokens": 4, "recycling": True} | options
    )


def budgets(count, each=4):
    return np.full(count, each, np.int32)


def shown(*contexts):
    """Feedback of one row that was verified behind these tokens; None = not verified."""
    ranked = [[-1] * 3 if at is None else [CHAIN.get(at, 7), at + 1, at + 2] for at in contexts]
    return Feedback(np.zeros(1, np.int32), np.array([0, len(contexts)]), top_k=np.array(ranked, np.int32))


def show(made, slots, last, committed):
    """A step whose draft is not accepted: the target ranks behind `last`, and `committed` comes next in the text."""
    made.draft(slots, budgets(1))
    made.observe(slots, shown(last))
    made.extend(slots, *ragged([committed]))


def test_what_was_ranked_is_drafted_where_no_text_helps():
    made = fusion()
    slots = made.open(*ragged([[1, 10]]))
    # None of the ranked tokens is committed, so no text knows them.
    for last, committed in ((10, [2, 20]), (20, [3, 30]), (30, [4, 5])):
        show(made, slots, last, committed)
    other = made.open(*ragged([[6, 10], [8, 9, 20]]))
    drafts = made.draft(other, budgets(2))
    assert drafts.tokens[drafts.row(0)].tolist() == [20, 30, 40]
    assert drafts.tokens[drafts.row(1)].tolist() == [30, 40]
    assert set(drafts.source.tolist()) == {Source.BY_PRODUCT}


@pytest.mark.parametrize("scope", ["off", "engine"])
def test_with_scope_off_a_ranking_is_its_sequences_alone(scope):
    made = fusion(scope=scope)
    slots = made.open(*ragged([[1, 10], [6, 10]]))
    made.draft(slots, budgets(2))
    made.observe(slots[:1], shown(10))
    made.extend(slots[:1], *ragged([[2, 3, 10]]))
    drafts = made.draft(slots, budgets(2, 1))
    assert drafts.tokens[drafts.row(0)].tolist() in ([20], [2])
    assert drafts.tokens[drafts.row(1)].tolist() == ([20] if scope == "engine" else [])
    # Nor is it one of who has the slot next.
    made.close(slots)
    again = made.open(*ragged([[6, 10]]))
    assert made.draft(again, budgets(1, 1)).tokens.tolist() == ([20] if scope == "engine" else [])


def test_rejected_nodes_teach_too():
    made = fusion()
    slots = made.open(*ragged([[8, 9, 10, 20, 8, 9]]))
    drafts = made.draft(slots, budgets(1))
    assert drafts.tokens[:2].tolist() == [10, 20]
    made.observe(slots, shown(9, 10, 20, None, None))
    made.extend(slots, *ragged([[7, 20]]))
    assert made.draft(slots, budgets(1, 1)).tokens.tolist() in ([8], [30])
    fresh = made.open(*ragged([[3, 20]]))
    assert made.draft(fresh, budgets(1, 1)).tokens.tolist() == [30]


def test_a_ranking_is_not_judged_by_the_token_that_it_foresaw():
    made = fusion()
    slots = made.open(*ragged([[1, 2, 3, 10]]))
    show(made, slots, 10, [20])
    rates = made.mixer.observed.reshape(KINDS, RATES // KINDS)
    # It was not known before, so that there was nothing to judge.
    assert rates[RANKED].sum() == 0
    made.extend(slots, *ragged([[5, 10, 20]]))
    assert rates[RANKED].sum() > 0


def test_without_the_setting_nothing_is_asked_for_or_learnt():
    made = fusion(recycling=False)
    assert made.feedback == frozenset()
    slots = made.open(*ragged([[1, 10]]))
    show(made, slots, 10, [2, 20])
    assert not len(made.draft(made.open(*ragged([[6, 10]])), budgets(1)).tokens)


def test_a_reused_slot_remembers_no_ranking_that_waited():
    made = fusion()
    slots = made.open(*ragged([[1, 10]]))
    made.draft(slots, budgets(1))
    made.observe(slots, shown(10))
    made.close(slots)
    again = made.open(*ragged([[5, 20]]))
    assert again.tolist() == slots.tolist()
    made.extend(again, *ragged([[10]]))
    assert not len(made.draft(again, budgets(1)).tokens)


def test_feedback_that_does_not_fit_is_refused():
    made = fusion()
    slots = made.open(*ragged([[1, 10]]))
    for bad in (
        Feedback(np.zeros(1, np.int32), np.array([0, 1]), top_k=np.zeros(3, np.int32)),
        Feedback(np.zeros(1, np.int32), np.array([0, 2]), top_k=np.zeros((1, 3), np.int32)),
    ):
        with pytest.raises(InputError):
            made.observe(slots, bad)
    with pytest.raises(InputError):
        made.observe(np.array([7]), shown(10))
    # More than was drafted, and other numbers of ranks than it keeps.
    made.observe(slots, shown(10, 20, 30))
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 1]), top_k=np.arange(20, dtype=np.int32)[None]))
    made.extend(slots, *ragged([[4]]))


@pytest.mark.parametrize("pacing", ["off", "on"])
@pytest.mark.parametrize("count", [1, 3])
def test_generate_writes_the_same_text(count: int, pacing: Any) -> None:
    which = tiny.model()
    ids = torch.cat([tiny.prompt(30, seed=i) % 5 + 20 for i in range(count)])
    ours = Speculative("fusion", recycling=True, pacing=pacing)
    for _ in range(2):
        expected = tiny.plain(which, ids, max_new_tokens=60)
        assert tiny.speculative(which, ids, ours, max_new_tokens=60).equal(expected)
        assert ours.statistics is not None
        assert ours.statistics.drafter_errors == 0
    drafted = ours.drafter
    assert drafted.feedback == frozenset({"top_k"})
    # Rows of the table that were written.
    assert drafted._table.clock[0] > 0  # type: ignore[attr-defined]

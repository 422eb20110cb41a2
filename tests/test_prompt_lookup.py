"""Prompt lookup against the naive reference."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.plugins.base import Source
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.ragged import ragged


def drafter(**options):
    return make_drafter("prompt_lookup", {"memory": "4MiB", **options})


@given(strategies.texts(), st.integers(1, 5), st.integers(0, 6), st.integers(0, 12), st.booleans())
@settings(max_examples=300)
def test_equals_naive(text, low, span, budget, earliest):
    occurrence = "earliest" if earliest else "recent"
    made = drafter(min_match=low, max_match=low + span, max_tokens=12, occurrence=occurrence)
    drafts = made.draft(made.open(*ragged([text])), np.array([budget], np.int32))
    expected = naive.prompt_lookup(text, low, low + span, budget, earliest=earliest)
    assert drafts.tokens.tolist() == expected
    assert drafts.parents.tolist() == list(range(-1, len(expected) - 1))
    assert drafts.offsets.tolist() == [0, len(expected)]
    assert (drafts.source == Source.OWN_TEXT).all()


def test_batch_with_empty_rows_and_budgets():
    made = drafter(max_tokens=4)
    slots = made.open(*ragged([[1, 2, 3, 1, 2], [], [7, 8, 9], [4, 5, 6, 4, 5]]))
    drafts = made.draft(slots, np.array([4, 4, 4, 1], np.int32))
    assert [drafts.tokens[drafts.row(i)].tolist() for i in range(4)] == [[3, 1, 2, 3], [], [], [6]]
    assert drafts.probability[:4] == pytest.approx(
        [2 / 5, 2 / 5 * 3 / 6, 2 / 5 * 3 / 6 * 4 / 7, 2 / 5 * 3 / 6 * 4 / 7 * 5 / 8]
    )


def test_max_tokens_bounds_the_budget():
    made = drafter(max_tokens=3)
    slots = made.open(*ragged([[1, 2, 3, 1, 2]]))
    assert len(made.draft(slots, np.array([100], np.int32)).tokens) == 3


def test_grows_with_the_text():
    made = drafter()
    slots = made.open(*ragged([[1, 2, 3]]))
    assert len(made.draft(slots, np.array([5], np.int32)).tokens) == 0
    made.extend(slots, *ragged([[1, 2]]))
    assert made.draft(slots, np.array([1], np.int32)).tokens.tolist() == [3]


def test_orders_of_n_are_checked():
    with pytest.raises(ConfigError, match="min_match must not exceed max_match"):
        drafter(min_match=6, max_match=5)


def test_closed_slots_and_missing_budgets_are_refused():
    made = drafter()
    slots = made.open(*ragged([[1, 1], [2, 2]]))
    with pytest.raises(InputError, match="one a slot"):
        made.draft(slots, np.array([1], np.int32))
    made.close(slots[:1])
    with pytest.raises(InputError, match="slots"):
        made.draft(slots, np.array([1, 1], np.int32))
    with pytest.raises(InputError, match="slots"):
        made.draft(np.array([10**6]), np.array([1], np.int32))

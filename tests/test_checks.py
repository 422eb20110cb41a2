"""What is wrong with a drafter's answer is found, whatever it is, and said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drafters import chain, chains
from hypothesis import given
from hypothesis import strategies as st

from freedraft.plugins import checks
from freedraft.plugins.base import Drafts
from freedraft.plugins.checks import checked_drafts, within_vocabulary
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import MAX_TOKEN

NODES = st.tuples(
    st.sampled_from([0, 1, 7, MAX_TOKEN - 1, MAX_TOKEN, -1, -(2**31)]),
    st.sampled_from([-1, -1, 0, 1, 2, -2, 2**31 - 1]),
    st.sampled_from([0.5, 0.1, math.nan, math.inf, -math.inf]),
)


def fault(rows: list[list[tuple[int, int, float]]], budget: list[int]) -> int:
    """As `checks` says it: of several faults the first in its list."""
    found = set()
    for row, most in zip(rows, budget, strict=True):
        if len(row) > most:
            found.add(checks.BAD_ROWS)
        for i, (token, parent, probability) in enumerate(row):
            if not math.isfinite(probability):
                found.add(checks.BAD_PROBABILITY)
            if token < 0 or token >= MAX_TOKEN:
                found.add(checks.BAD_TOKENS)
            if parent < -1 or parent >= i:
                found.add(checks.BAD_PARENTS)
    return min(found, default=checks.SOUND)


def drafts_of(rows: list[list[tuple[int, int, float]]]) -> Drafts:
    nodes = [node for row in rows for node in row]
    return Drafts(
        np.array([token for token, _, _ in nodes], np.int32),
        np.array([parent for _, parent, _ in nodes], np.int32),
        np.array([probability for _, _, probability in nodes], np.float32),
        np.ones(len(nodes), np.uint8),
        np.cumsum([0, *map(len, rows)]).astype(np.int64),
    )


MESSAGES = {
    checks.BAD_ROWS: "with a budget of",
    checks.BAD_PROBABILITY: "not a number",
    checks.BAD_TOKENS: "token ids",
    checks.BAD_PARENTS: "an earlier node",
}


@given(st.lists(st.lists(NODES, max_size=3), max_size=4), st.data())
def test_equals_naive(rows: list[list[tuple[int, int, float]]], data: st.DataObject) -> None:
    budget = [data.draw(st.integers(max(0, len(row) - 1), 4)) for row in rows]
    drafts, most = drafts_of(rows), np.array(budget, np.int32)
    wrong = fault(rows, budget)
    if wrong == checks.SOUND:
        assert checked_drafts(drafts, most).tokens.tolist() == drafts.tokens.tolist()
    else:
        with pytest.raises(InputError, match=MESSAGES[wrong]):
            checked_drafts(drafts, most)


def test_empty_rows_that_fall_reach_no_kernel() -> None:
    drafts = Drafts.empty(2)
    drafts.offsets[1] = 5
    with pytest.raises(InputError, match="with a budget of"):
        checked_drafts(drafts, np.array([9, 9], np.int32))


def test_no_draft_may_be_of_any_type() -> None:
    nothing: Any = np.array([])
    drafts = checked_drafts(Drafts(nothing, nothing, nothing, nothing, np.zeros(3, np.int64)), np.array([1, 1]))
    assert [array.dtype for array in (drafts.tokens, drafts.parents, drafts.probability, drafts.source)] == [
        np.int32,
        np.int32,
        np.float32,
        np.uint8,
    ]
    assert drafts.rows == 2


def test_views_with_gaps_and_what_cannot_be_written_to_come_as_kernels_know_them() -> None:
    whole = chains([[1, 2], [3]])
    wide = np.zeros((3, 2), np.float32)
    wide[:, 0] = whole.probability
    whole.tokens.flags.writeable = False
    checked_drafts(whole, np.array([2, 2], np.int32))
    compiled = len(checks._fault.signatures)  # type: ignore[attr-defined]
    drafts = Drafts(whole.tokens, whole.parents, wide[:, 0], whole.source, whole.offsets)
    checked = checked_drafts(drafts, np.array([2, 2], np.int32))
    assert len(checks._fault.signatures) == compiled  # type: ignore[attr-defined]
    assert checked.probability.tolist() == whole.probability.tolist()
    assert all(a.flags.carray for a in (checked.tokens, checked.parents, checked.probability, checked.offsets))


def test_rows_beyond_the_vocabulary_are_left_out() -> None:
    assert within_vocabulary(chain([1, 2]), 3).tokens.tolist() == [1, 2]
    assert within_vocabulary(chains([[1, 9], [2]]), 3).tokens.tolist() == [2]

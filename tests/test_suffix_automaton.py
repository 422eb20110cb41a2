"""The suffix-automaton drafter against the naive reference."""

from __future__ import annotations

import random

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from freedraft.plugins.own_text import ESCAPE
from freedraft.plugins.registry import make_drafter
from freedraft.plugins.suffix_automaton import CONTEXTS_TRIED
from freedraft.retrieval.growth import CHAIN_CAP
from freedraft.retrieval.ragged import ragged


def drafter(**options):
    plain = {"memory": "4MiB", "min_expected": 0, "min_probability": 0, "max_tokens": 32}
    return make_drafter("suffix_automaton", {**plain, **options})


@given(
    strategies.texts(max_size=60),
    st.integers(0, 20),
    st.fixed_dictionaries(
        {
            "min_match": st.integers(1, 4),
            "min_probability": st.sampled_from([0.0, 0.2, 0.7]),
            "tokens_per_match": st.sampled_from([None, 0.5, 2.0]),
            "min_expected": st.sampled_from([0.0, 0.8, 2.0]),
        }
    ),
)
@settings(max_examples=400)
def test_equals_naive(text, budget, options):
    assume(all(len(naive.contexts(text[:n])) < CHAIN_CAP for n in range(len(text) + 1)))
    made = drafter(**options)
    drafts = made.draft(made.open(*ragged([text])), np.array([budget], np.int32))
    tokens, probabilities = naive.suffix_draft(text, budget, contexts_tried=CONTEXTS_TRIED, escape=ESCAPE, **options)
    assert drafts.tokens.tolist() == tokens
    assert drafts.probability == pytest.approx(probabilities, rel=1e-5)
    assert drafts.parents.tolist() == list(range(-1, len(tokens) - 1))


def test_probabilities_fall_along_a_chain_and_stay_in_range():
    source = random.Random(0)
    rows = [[source.randrange(8) for _ in range(300)] for _ in range(30)]
    made = drafter()
    drafts = made.draft(made.open(*ragged(rows)), np.full(30, 20, np.int32))
    assert len(drafts.tokens) > 100
    assert ((drafts.probability > 0) & (drafts.probability <= 1)).all()
    for i in range(30):
        chain = drafts.probability[drafts.row(i)]
        assert (np.diff(chain) <= 0).all()


@pytest.mark.parametrize("text", [[3] * 500, [1, 2, 3] * 200, naive.fibonacci_word(600), naive.de_bruijn(2, 9)])
def test_adversarial_text_gives_valid_drafts(text):
    made = drafter()
    drafts = made.draft(made.open(*ragged([text])), np.array([32], np.int32))
    assert len(drafts.tokens) == 32
    assert set(drafts.tokens.tolist()) <= set(text)


def test_a_run_and_a_period_are_drafted_on():
    made = drafter()
    slots = made.open(*ragged([[7] * 20, [1, 2, 3] * 7]))
    drafts = made.draft(slots, np.array([8, 8], np.int32))
    assert drafts.tokens[drafts.row(0)].tolist() == [7] * 8
    assert drafts.tokens[drafts.row(1)].tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


def test_defaults_do_not_draft_on_a_weak_match():
    made = make_drafter("suffix_automaton", {"memory": "4MiB"})
    # One token matched once: less than half a token is expected, which does not pay.
    weak = [5, 6, 7, 8, 5]
    strong = [*range(100, 120), *range(100, 110)]
    slots = made.open(*ragged([weak, strong]))
    drafts = made.draft(slots, np.array([12, 12], np.int32))
    assert drafts.tokens[drafts.row(0)].tolist() == []
    assert drafts.tokens[drafts.row(1)].tolist()[:10] == list(range(110, 120))

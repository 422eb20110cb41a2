"""Fusion's trees: the likeliest nodes of all, judged along the branch that was committed."""

from __future__ import annotations

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import ragged


def fusion(**options):
    return make_drafter(
        "fusion", {"memory": "8MiB", "min_probability": 0.01, "max_tokens": 8, "shape": "tree", **options}
    )


def budgets(count, each=8):
    return np.full(count, each, np.int32)


# The longest match was followed by 3, 10, once; the one in it by 4, 11, three times.
EITHER = [5, 1, 2, 3, 10, 6, 1, 2, 4, 11, 7, 1, 2, 4, 11, 8, 1, 2, 4, 11, 5, 1, 2]


def branches(drafts, row=0):
    """Each node's tokens from the committed text on, with its probability."""
    part = drafts.row(row)
    found = []
    for token, parent, p in zip(
        drafts.tokens[part].tolist(), drafts.parents[part].tolist(), drafts.probability[part].tolist(), strict=True
    ):
        found.append(([*found[parent][0], token] if parent >= 0 else [token], p))
    return found


def assert_is_a_tree(drafts, limits):
    lengths = np.diff(drafts.offsets)
    assert (lengths <= np.maximum(limits, 0)).all()
    for row in range(len(limits)):
        nodes = branches(drafts, row)
        assert len({tuple(branch) for branch, _ in nodes}) == len(nodes)
        parents = drafts.parents[drafts.row(row)].tolist()
        assert all(-1 <= parent < node for node, parent in enumerate(parents))
        # Best-first: no node is likelier than one before it.
        assert (np.diff(drafts.probability[drafts.row(row)]) <= 1e-6).all()
        assert all(0 < p <= 1 for _, p in nodes)


@given(st.lists(strategies.texts(max_size=40), min_size=1, max_size=4), st.lists(st.integers(-1, 12), min_size=4))
@settings(max_examples=60, deadline=None)
def test_random_text_keeps_the_contract(texts, limits):
    made = fusion(min_probability=0)
    slots = made.open(*ragged(texts))
    budget = np.array(limits[: len(texts)], np.int32)
    for _ in range(3):
        drafts = made.draft(slots, budget)
        assert_is_a_tree(drafts, np.minimum(budget, 8))
        # Commit the last branch of each tree, and a token more.
        committed = [[*branches(drafts, i)[-1][0], 3] if len(branches(drafts, i)) else [1] for i in range(len(texts))]
        made.extend(slots, *ragged(committed))
    made.close(slots)


def test_both_ways_to_go_on_are_in_the_tree():
    made = fusion()
    drafts = made.draft(made.open(*ragged([EITHER])), budgets(1))
    found = [branch for branch, _ in branches(drafts)]
    assert [3] in found
    assert [4] in found
    assert [4, 11] in found
    assert [3, 10] in found


def test_where_one_way_is_far_ahead_the_tree_is_the_chain():
    text = [*range(50, 70), *range(50, 60)]
    tree, chain = fusion(), fusion(shape="chain")
    of_tree = tree.draft(tree.open(*ragged([text])), budgets(1))
    of_chain = chain.draft(chain.open(*ragged([text])), budgets(1))
    assert of_tree.tokens.tolist() == of_chain.tokens.tolist() == list(range(60, 68))
    assert of_tree.parents.tolist() == of_chain.parents.tolist()
    np.testing.assert_allclose(of_tree.probability, of_chain.probability)


@given(strategies.texts(max_size=60), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_a_tree_expects_no_less_than_a_chain_of_as_many_nodes(text, budget):
    tree, chain = fusion(min_probability=0), fusion(min_probability=0, shape="chain")
    of_tree = tree.draft(tree.open(*ragged([text])), budgets(1, budget))
    of_chain = chain.draft(chain.open(*ragged([text])), budgets(1, budget))
    assert of_tree.probability.sum() >= of_chain.probability.sum() - 1e-5


def test_the_last_stage_learns_of_every_branch_that_was_looked_at():
    made = fusion()
    slots = made.open(*ragged([EITHER]))
    drafts = made.draft(slots, budgets(1))
    parents = drafts.parents.tolist()
    first = sum(parent == -1 for parent in parents)
    node = drafts.tokens.tolist().index(4)
    behind = sum(parent == node for parent in parents)
    before = made.mixer.corrected.sum(axis=1)
    made.extend(slots, *ragged([[4, 99, 98]]))
    # Behind no token that was foreseen, and behind one; behind a wrong token nothing is learnt.
    learnt = made.mixer.corrected.sum(axis=1) - before
    np.testing.assert_allclose(learnt, [first, behind, 0, 0, first + behind], atol=1e-4)
    made.draft(slots, budgets(1))
    made.extend(slots, *ragged([[]]))
    before = made.mixer.corrected.sum()
    made.extend(slots, *ragged([[4]]))
    assert made.mixer.corrected.sum() == before


def test_probabilities_of_siblings_are_calibrated_on_text_of_known_chances():
    """Each token of one sequence is drawn from two; the shares in which first-level nodes are right must be near."""
    made = fusion(max_tokens=2, min_probability=0)
    dice = np.random.default_rng(0)
    draws = [(5 if dice.random() < 0.7 else 6) for _ in range(4000)]
    slots = made.open(*ragged([[9, *draws[:100]]]))
    predicted, right = [], []
    for token in draws[100:]:
        drafts = made.draft(slots, budgets(1, 2))
        for guess, parent, p in zip(drafts.tokens, drafts.parents, drafts.probability, strict=True):
            if parent == -1:
                predicted.append(p)
                right.append(guess == token)
        made.extend(slots, *ragged([[token]]))
    late = slice(len(right) // 2, None)
    assert np.mean(predicted[late]) == pytest.approx(np.mean(right[late]), abs=0.05)


def test_rankings_are_learnt_along_the_branches():
    """What the target ranked behind a rejected branch is drafted when that context comes."""
    from freedraft.plugins.base import Feedback

    made = fusion(recycling=True)
    slots = made.open(*ragged([EITHER]))
    drafts = made.draft(slots, budgets(1))
    nodes = branches(drafts)
    node = [branch for branch, _ in nodes].index([4])
    top_k = np.full((1 + len(nodes), 8), -1, np.int32)
    top_k[0] = np.arange(200, 208)
    top_k[1 + node] = np.arange(300, 308)
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, len(top_k)]), top_k=top_k))
    made.extend(slots, *ragged([[77, 2, 4]]))
    drafts = made.draft(slots, budgets(1))
    assert 300 in drafts.tokens.tolist()


def test_bad_slots_and_threads():
    made, several = fusion(), fusion(threads=3)
    with pytest.raises(InputError, match="slots"):
        made.draft(np.array([3]), budgets(1))
    texts = [[i % 7, 1, 2, 3, i % 5, 1, 2] * 3 for i in range(100)]
    found = []
    for one in (made, several):
        drafts = one.draft(one.open(*ragged(texts)), budgets(100))
        found.append([drafts.tokens.tolist(), drafts.parents.tolist(), drafts.offsets.tolist()])
    assert found[0] == found[1]

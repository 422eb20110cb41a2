"""The likeliest branch of a tree, and whether there is a tree at all, against what is written the plain way."""

from __future__ import annotations

import drafters
import naive
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from freedraft.plugins.branches import likeliest_chains
from freedraft.plugins.pacing_rule import is_tree

# Of each node a draw for its parent, and its probability: with few values, so that some are equal.
nodes = st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.1, 0.5, 0.9])), max_size=8)


def drafts_of(rows):
    """The rows as drafts; node i of a row hangs on one of the i before it, or on the committed text."""
    rows = [[(draw % (i + 1) - 1, chance) for i, (draw, chance) in enumerate(row)] for row in rows]
    return rows, drafters.of_nodes(rows)


@given(st.lists(nodes, max_size=4))
def test_chains_are_the_likeliest_branches(given_rows):
    rows, drafts = drafts_of(given_rows)
    chains, chosen = likeliest_chains(drafts)
    assert chains.rows == len(rows)
    for i, row in enumerate(rows):
        expected = naive.likeliest_branch(row)
        kept = chains.row(i)
        assert chosen[kept].tolist() == expected
        assert chains.parents[kept].tolist() == list(range(-1, len(expected) - 1))
        whole = [int(drafts.offsets[i]) + node for node in expected]
        for name in ("tokens", "probability", "source"):
            assert getattr(chains, name)[kept].tolist() == getattr(drafts, name)[whole].tolist()


@given(st.lists(nodes, max_size=4))
def test_a_tree_is_what_its_likeliest_branch_is_not_all_of(given_rows):
    rows, drafts = drafts_of(given_rows)
    expected = any(len(naive.likeliest_branch(row)) < len(row) for row in rows)
    assert is_tree(drafts.parents, drafts.offsets, np.ones(len(drafts.tokens), np.bool_)) == expected


@given(st.lists(nodes, max_size=4))
def test_chains_marked_in_trees_are_none(given_rows):
    rows, drafts = drafts_of(given_rows)
    marks = np.zeros(len(drafts.tokens), np.bool_)
    for start, row in zip(drafts.offsets[:-1], rows, strict=True):
        marks[[start + node for node in naive.likeliest_branch(row)]] = True
    assert not is_tree(drafts.parents, drafts.offsets, marks)

"""The table of what follows a follower, and what it brings: lists that are numbered."""

from __future__ import annotations

import numpy as np
import pytest

from freedraft.plugins.evidence import INDIRECT, KIND, LATEST, LIKELIEST, MATCHED, OWN, RESPONSES, SEEN, empty_evidence
from freedraft.plugins.fusion import Fusion, FusionSettings
from freedraft.plugins.indirect import ENTRIES, MAX_TRUST, gather_indirect, learn_indirect, no_successors
from freedraft.retrieval.ragged import ragged


def followed_by(token, matched=1, kind=OWN):
    """The evidence of one context whose last follower is `token`."""
    evidence = empty_evidence()
    evidence[0, KIND], evidence[0, MATCHED], evidence[0, LATEST] = kind, matched, token
    return evidence


def foreseen(successors, token, owner=0, **context):
    """The successor of a follower and its trust, or None."""
    evidence = followed_by(token, **context)
    rows = gather_indirect(successors, owner, evidence, 1)
    if rows == 1:
        return None
    assert rows == 2
    assert evidence[1, KIND] == INDIRECT
    return int(evidence[1, LIKELIEST]), int(evidence[1, SEEN])


def learn(successors, token, then, owner=0, **context):
    learn_indirect(successors, owner, followed_by(token, **context), 1, then)


def test_what_came_instead_is_foreseen_after_the_same_follower():
    table = no_successors()
    assert foreseen(table, 7) is None
    learn(table, 7, 8)
    assert foreseen(table, 7) == (8, 1)
    assert foreseen(table, 8) is None
    learn(table, 7, 8)
    assert foreseen(table, 7) == (8, 2)


def test_another_takes_its_place_once_it_came_as_often():
    table = no_successors()
    learn(table, 7, 8)
    learn(table, 7, 8)
    learn(table, 7, 9)
    assert foreseen(table, 7) == (8, 1)
    learn(table, 7, 9)
    assert foreseen(table, 7) == (9, 1)


def test_trust_is_bounded_and_repetition_teaches_nothing():
    table = no_successors()
    for _ in range(MAX_TRUST + 5):
        learn(table, 7, 8)
    learn(table, 7, 7)
    assert foreseen(table, 7) == (8, MAX_TRUST)


def test_an_entry_is_its_owners_alone():
    table = no_successors()
    learn(table, 7, 8, owner=3)
    assert foreseen(table, 7, owner=3) == (8, 1)
    assert foreseen(table, 7, owner=0) is None
    # Nor is one that shares the entry taken for it.
    assert foreseen(table, 7 + ENTRIES, owner=3) is None


def test_only_the_own_text_counts():
    table = no_successors()
    learn(table, 7, 8, kind=RESPONSES)
    assert not table.any()
    learn(table, 7, 8)
    assert foreseen(table, 7, kind=RESPONSES) is None
    empty = empty_evidence()
    assert gather_indirect(table, 0, empty, 0) == 0
    learn_indirect(table, 0, empty, 0, 5)


def test_a_full_table_of_evidence_is_left_as_it_is():
    table = no_successors()
    learn(table, 7, 8)
    evidence = followed_by(7)
    assert gather_indirect(table, 0, evidence, len(evidence)) == len(evidence)


@pytest.mark.parametrize("scope", ["engine", "off"])
def test_a_list_is_numbered_on_as_another_one_was(scope):
    """A number stands behind a line's end, 50; then follows 60, and a word that is in no other list."""
    made = Fusion(FusionSettings(scope=scope))

    def items(first, last, words):
        return [token for i in range(first, last) for token in (i, 60, words + i, 50)]

    slots = made.open(*ragged([[9, 50]]))
    for words in range(100, 2000, 100):
        made.draft(slots, np.array([1], np.int32))
        made.extend(slots, *ragged([items(1, 8, words)]))
        if scope == "engine":
            made.close(slots)
            slots = made.open(*ragged([[9, 50]]))
    made.draft(slots, np.array([1], np.int32))
    made.extend(slots, *ragged([items(1, 4, 5000)]))
    drafts = made.draft(slots, np.array([2], np.int32))
    assert drafts.tokens.tolist() == [4, 60]


def test_a_sequence_alone_learns_from_itself_only():
    made = Fusion(FusionSettings(scope="off"))
    first, second = made.open(*ragged([[9, 50], [9, 50]]))
    for slot in (first, second):
        made.draft(np.array([slot]), np.array([1], np.int32))
    made.extend(np.array([first]), *ragged([[1, 50, 2, 50, 3, 50]]))
    made.extend(np.array([second]), *ragged([[1, 50]]))
    drafted = made.draft(np.array([second]), np.array([1], np.int32))
    assert 2 not in drafted.tokens.tolist()

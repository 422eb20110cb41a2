"""The table of what follows a follower, and what it brings: lists that are numbered."""

from __future__ import annotations

import numpy as np
import pytest

from freedraft.plugins.evidence import INDIRECT, KIND, LATEST, LIKELIEST, MATCHED, OWN, RESPONSES, SEEN, empty_evidence
from freedraft.plugins.fusion import Fusion, FusionSettings
from freedraft.plugins.indirect import ENTRIES, MAX_TRUST, entry_of, gather_indirect, learn_indirect, no_successors
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


def test_of_two_followers_in_one_entry_the_one_that_was_surer_stays_for_a_while():
    table = no_successors()
    for _ in range(3):
        learn(table, 7, 8)
    learn(table, 7 + ENTRIES, 9)
    assert foreseen(table, 7) == (8, 2)
    for _ in range(2):
        learn(table, 7 + ENTRIES, 9)
    assert foreseen(table, 7) is None
    assert foreseen(table, 7 + ENTRIES) == (9, 1)


def test_trust_is_bounded_and_repetition_teaches_nothing():
    table = no_successors()
    for _ in range(MAX_TRUST + 5):
        learn(table, 7, 8)
    learn(table, 7, 7)
    assert foreseen(table, 7) == (8, MAX_TRUST)


def test_an_entry_is_its_owners_alone():
    table = no_successors()
    for _ in range(3):
        learn(table, 7, 8, owner=3)
    assert foreseen(table, 7, owner=3) == (8, 3)
    # These share the entry.
    for token, owner in ((7, 3 + ENTRIES), (7 + ENTRIES, 3)):
        assert (entry_of(table, owner, token) == entry_of(table, 3, 7)).all()
        assert foreseen(table, token, owner=owner) is None
    learn(table, 7, 8, owner=3 + ENTRIES)
    assert foreseen(table, 7, owner=3) is None
    assert foreseen(table, 7, owner=3 + ENTRIES) == (8, 1)


def test_only_the_own_text_counts():
    table = no_successors()
    learn(table, 7, 8, kind=RESPONSES)
    assert not table.any()
    learn(table, 7, 8)
    assert foreseen(table, 7, kind=RESPONSES) is None
    empty, before = empty_evidence(), table.copy()
    assert gather_indirect(table, 0, empty, 0) == 0
    learn_indirect(table, 0, empty, 0, 5)
    assert (table == before).all()


def test_a_full_table_of_evidence_is_left_as_it_is():
    table = no_successors()
    learn(table, 7, 8)
    evidence = followed_by(7)
    before = evidence.copy()
    assert gather_indirect(table, 0, evidence, len(evidence)) == len(evidence)
    assert (evidence == before).all()


def items(last, words):
    """A list: a number stands behind a line's end, 50; then follows 60, and a word that is in no other list."""
    return [token for i in range(1, last + 1) for token in (i, 60, words + i, 50)]


def told(made, slot, text):
    """Draft once, so that a reply is on, and commit `text`."""
    made.draft(np.array([slot]), np.array([1], np.int32))
    made.extend(np.array([slot]), *ragged([text]))


@pytest.mark.parametrize("scope", ["engine", "off"])
def test_a_list_is_numbered_on_as_others_were(scope):
    made = Fusion(FusionSettings(scope=scope))
    slots = made.open(*ragged([[9, 50]]))
    for words in range(100, 2000, 100):
        told(made, slots[0], items(7, words))
        if scope == "engine":
            made.close(slots)
            slots = made.open(*ragged([[9, 50]]))
    told(made, slots[0], items(3, 5000))
    assert made.draft(slots, np.array([2], np.int32)).tokens.tolist() == [4, 60]


@pytest.mark.parametrize("scope", ["engine", "off"])
def test_other_sequences_lists_count_for_the_engine_only(scope):
    made = Fusion(FusionSettings(scope=scope))
    first, second = made.open(*ragged([[9, 50], [9, 50]]))
    for words in range(100, 2000, 100):
        told(made, first, items(7, words))
    told(made, second, items(3, 5000))
    drafted = made.draft(np.array([second]), np.array([1], np.int32)).tokens.tolist()
    assert (drafted == [4]) == (scope == "engine")

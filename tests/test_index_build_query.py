"""What an index says of a text: continuations, drafts and documents as the naive reference counts them."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive_corpus import chain
from small_index import create

from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.index.continuation import ESCAPE, SUFFIXES_TRIED
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.segment import Segment, segment_bytes
from freedraft.retrieval.index.store import CorpusIndex
from freedraft.retrieval.query import Follower, documents_with, likeliest_draft
from freedraft.retrieval.ragged import ragged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("segments")


def segments_of(folder, parts, min_count=1):
    opened = []
    for i, rows in enumerate(parts):
        documents = Documents.of((f"part {i} row {j}", np.array(row, np.int32)) for j, row in enumerate(rows))
        path = folder / f"{i}.segment"
        path.write_bytes(b"".join(piece.tobytes() for piece in segment_bytes(documents, min_count)))
        opened.append(Segment(path))
    return opened


def tokens_of(text):
    return np.array(text, np.int32)


def expected(rows, text, min_count=1):
    length = naive.index_match(rows, text, min_count)
    if not length:
        return 0, 0, []
    context = text[len(text) - length :]
    after = naive.index_continuations(rows, context, min_count)
    return length, naive.index_count(rows, context), sorted(after.items(), key=lambda item: (-item[1], item[0]))


@given(st.lists(strategies.corpora(max_documents=4), max_size=3), st.data())
@settings(max_examples=150, deadline=None)
def test_segments_together_are_one_corpus(folder, parts, data):
    rows = [row for part in parts for row in part]
    text = data.draw(strategies.queries(rows))
    follower = Follower(segments_of(folder, parts))
    for start in range(0, len(text), 3):
        follower.advance(tokens_of(text[start : start + 3]))
    known = follower.continuation()
    assert (known.length, known.count, known.tokens) == expected(rows, text)


@given(strategies.corpora(), st.sampled_from([2, 3]), st.data())
@settings(max_examples=100, deadline=None)
def test_rare_continuations_are_not_there(folder, rows, min_count, data):
    text = data.draw(strategies.queries(rows))
    follower = Follower(segments_of(folder, [rows], min_count))
    follower.advance(tokens_of(text))
    known = follower.continuation()
    assert (known.length, known.count, known.tokens) == expected(rows, text, min_count)


@given(st.lists(strategies.corpora(max_documents=3), max_size=3), st.integers(0, 6), st.data())
@settings(max_examples=100, deadline=None)
def test_draft_is_the_segments_that_expects_most(folder, parts, budget, data):
    text = data.draw(strategies.queries([row for part in parts for row in part]))
    # Beyond, fewer contexts are looked at.
    assume(all(naive.index_match(rows, text) <= SUFFIXES_TRIED for rows in parts))
    drafted = likeliest_draft(segments_of(folder, parts), tokens_of(text), budget)
    chains = [chain(rows, text, budget) for rows in parts]
    most = max((sum(probabilities) for _, probabilities in chains), default=0)
    assert sum(one.probability for one in drafted) == pytest.approx(most, rel=1e-5)
    assert [one.token for one in drafted] in [tokens for tokens, _ in chains] or not drafted


@given(strategies.corpora(), st.integers(1, 6), st.data())
@settings(max_examples=100, deadline=None)
def test_a_draft_says_where_its_tokens_come_from(folder, rows, budget, data):
    text = data.draw(strategies.queries(rows))
    so_far = list(text)
    probability = 1.0
    for one in likeliest_draft(segments_of(folder, [rows]), tokens_of(text), budget):
        context = so_far[len(so_far) - one.length :]
        assert (one.token, one.times) == naive.index_likeliest(rows, context)
        assert one.count == naive.index_count(rows, context)
        probability *= min(1.0, one.times / (one.count + ESCAPE / one.length))
        assert one.probability == pytest.approx(probability, rel=1e-5)
        so_far.append(one.token)


@given(st.lists(strategies.corpora(max_documents=3), max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_draft_is_what_corpus_drafts(tmp_path_factory, parts, data):
    text = data.draw(strategies.queries([row for part in parts for row in part]))
    folder = create(tmp_path_factory.mktemp("index") / "i", *parts)
    settings = {"index": folder, "max_tokens": 5, "min_match": 1, "min_probability": 0, "min_expected": 0}
    drafter = make_drafter("corpus", settings)
    drafts = drafter.draft(drafter.open(*ragged([text])), np.array([5], np.int32))
    shown = likeliest_draft(CorpusIndex(folder).segments, tokens_of(text), 5)
    assert [one.token for one in shown] == drafts.tokens.tolist()
    assert [one.probability for one in shown] == drafts.probability.tolist()


@given(st.lists(strategies.corpora(max_documents=3), max_size=3), st.lists(st.integers(0, 3), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_documents_are_those_that_contain_it(folder, parts, pattern):
    times = {}
    for i, rows in enumerate(parts):
        for j, row in enumerate(rows):
            count = naive.index_count([row], pattern)
            if count:
                times[f"part {i} row {j}"] = count
    found, all_of_them = documents_with(segments_of(folder, parts), tokens_of(pattern))
    assert all_of_them
    assert dict(found) == times
    assert found == sorted(found, key=lambda item: (-item[1], item[0]))


def test_nothing_known(folder):
    for parts in ([], [[]], [[[], []]]):
        segments = segments_of(folder, parts)
        assert likeliest_draft(segments, tokens_of([1, 2]), 4) == []
        assert documents_with(segments, tokens_of([1])) == ([], True)

"""What an index says of a text: continuations, drafts and documents as the naive reference counts them."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.segment import Segment, segment_bytes
from freedraft.retrieval.query import Follower, documents_with, greedy_draft


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
def test_draft_takes_the_likeliest_token_again_and_again(folder, parts, budget, data):
    rows = [row for part in parts for row in part]
    text = data.draw(strategies.queries(rows))
    drafted = greedy_draft(segments_of(folder, parts), tokens_of(text), budget)
    probability = 1.0
    so_far = list(text)
    for one in drafted:
        length, count, after = expected(rows, so_far)
        assert (one.length, one.count, (one.token, one.times)) == (length, count, after[0])
        probability *= one.times / one.count
        assert one.probability == pytest.approx(probability)
        so_far.append(one.token)
    assert len(drafted) == budget or not expected(rows, so_far)[2]


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
        assert greedy_draft(segments, tokens_of([1, 2]), 4) == []
        assert documents_with(segments, tokens_of([1])) == ([], True)

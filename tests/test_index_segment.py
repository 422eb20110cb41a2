"""Segments against the naive reference: matches, counts and continuations."""

from __future__ import annotations

import random

import naive
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.follow import CURSOR_FIELDS, find_batch
from freedraft.retrieval.index.segment import Segment, segment_bytes
from freedraft.retrieval.ragged import ragged

MAX_TOKEN = 2**31 - 1


def documents_of(rows):
    return Documents.of((f"document {i}", np.array(row, np.int32)) for i, row in enumerate(rows))


def build(folder, rows, min_count=1):
    path = folder / "a.segment"
    path.write_bytes(b"".join(piece.tobytes() for piece in segment_bytes(documents_of(rows), min_count)))
    return Segment(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("segments")


def assert_same(segment, rows, text, min_count=1):
    """After every token of `text`, every context is the naive one."""
    cursors = segment.new_cursors(1)
    slots = np.zeros(1, np.int64)
    for n in range(len(text) + 1):
        so_far = text[:n]
        if n:
            segment.advance(cursors, slots, *ragged([[text[n - 1]]]))
        got = segment.contexts(cursors, slots, depth=len(text) + 1)
        lengths = [length for length in got.length[0].tolist() if length > 0]
        longest = naive.index_match(rows, so_far, min_count)
        assert (lengths[0] if lengths else 0) == longest
        for i, length in enumerate(lengths):
            context = so_far[n - length :]
            assert got.count[0, i] == naive.index_count(rows, context)
            assert (got.likeliest[0, i], got.times[0, i]) == naive.index_likeliest(rows, context, min_count)
        # What is skipped between two contexts occurs exactly where the longer one does.
        for longer, shorter in zip(lengths, [*lengths, 0][1:], strict=True):
            if shorter + 1 < longer:
                counts = {naive.index_count(rows, so_far[n - m :]) for m in (longer, shorter + 1)}
                assert len(counts) == 1


@given(strategies.corpora(), st.sampled_from([1, 1, 2, 3]), st.data())
@settings(max_examples=400, deadline=None)
def test_equals_naive_after_every_token(folder, rows, min_count, data):
    segment = build(folder, rows, min_count)
    segment.verify()
    assert_same(segment, rows, data.draw(strategies.queries(rows)), min_count)


@pytest.mark.parametrize("min_count", [1, 2, 4])
@pytest.mark.parametrize("alphabet", [2, 3, 10, 200])
def test_equals_naive_on_longer_texts(folder, alphabet, min_count):
    source = random.Random(alphabet)
    rows = [[source.randrange(alphabet) for _ in range(source.randrange(60))] for _ in range(8)]
    rows += [rows[0][3:] + rows[1], rows[2], rows[2], []]
    segment = build(folder, rows, min_count)
    segment.verify()
    text = []
    for _ in range(12):
        row = source.choice(rows)
        start = source.randrange(len(row) + 1)
        text += row[start : start + source.randrange(12)] + [source.randrange(alphabet)]
    assert_same(segment, rows, text, min_count)


ADVERSARIAL = {
    "one token": [[5] * 60],
    "one token, many documents": [[5] * n for n in range(12)],
    "equal documents": [[1, 2, 3, 4, 5]] * 4,
    "prefixes and suffixes": [list(range(10))[a:b] for a in range(4) for b in (5, 10)],
    "period 2": [[1, 2] * 30],
    "period 7": [list(range(7)) * 9],
    "fibonacci": [naive.fibonacci_word(90)],
    "de bruijn": [naive.de_bruijn(2, 6)],
    "all distinct": [list(range(50))],
    "largest ids": [[MAX_TOKEN, 0, MAX_TOKEN, MAX_TOKEN - 1], [0, MAX_TOKEN]],
    "run, then another": [[1] * 25 + [2] + [1] * 24],
    "nothing": [],
    "only empty documents": [[], []],
    "documents of one token": [[3], [4], [3]],
}


@pytest.mark.parametrize("min_count", [1, 2])
@pytest.mark.parametrize("rows", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_equals_naive_on_adversarial_corpora(folder, rows, min_count):
    segment = build(folder, rows, min_count)
    segment.verify()
    whole = [token for row in rows for token in row]
    for text in (whole[:80], whole[::-1][:40], [1] * 30, [5] * 70, [1, 2, 3, 9, 1, 2]):
        assert_same(segment, rows, text, min_count)


@given(strategies.corpora(), st.lists(st.integers(0, 5), max_size=4))
@settings(max_examples=150, deadline=None)
def test_finds_exactly_the_strings_that_occur(folder, rows, extra):
    segment = build(folder, rows)
    cursor = np.zeros(CURSOR_FIELDS, np.int32)
    strings = [row[a:b] for row in rows for a in range(0, len(row), 3) for b in range(a, min(a + 9, len(row)) + 1)]
    for string in strings + [string + extra for string in strings[:20]]:
        occurs = not string or any(
            row[i : i + len(string)] == string for row in rows for i in range(len(row) - len(string) + 1)
        )
        assert find_batch(segment.automaton, np.array(string, np.int32), cursor) == occurs


def test_a_batch_is_its_rows(folder):
    source = random.Random(1)
    rows = [[source.randrange(4) for _ in range(100)] for _ in range(4)]
    segment = build(folder, rows)
    texts = [[source.randrange(5) for _ in range(n)] for n in (0, 1, 50, 7)]
    cursors = segment.new_cursors(6)
    slots = np.array([4, 0, 5, 2])
    segment.advance(cursors, slots, *ragged(texts))
    for text, slot in zip(texts, slots, strict=True):
        alone = segment.new_cursors(1)
        segment.advance(alone, np.zeros(1, np.int64), *ragged([text]))
        assert (alone[0] == cursors[slot])[:2].all()
        assert alone[0, 6] == cursors[slot, 6]
    assert (cursors[[1, 3], :7] == 0).all()


def test_documents_come_back(folder):
    rows = [[1, 2, 3], [], [4], [1, 2, 3]]
    segment = build(folder, rows)
    assert [(name, tokens.tolist()) for name, tokens in segment.documents()] == [
        (f"document {i}", row) for i, row in enumerate(rows)
    ]
    assert (segment.digests[0] == segment.digests[3]).all()
    assert (segment.digests[0] != segment.digests[1]).any()
    assert len(segment) == 4
    assert segment.tokens == 7
    assert segment.name(3) == "document 3"


def test_same_documents_same_bytes():
    rows = [[1, 2, 3, 1, 2], [2, 3]]
    first, second = (b"".join(p.tobytes() for p in segment_bytes(documents_of(rows))) for _ in range(2))
    assert first == second


def test_bad_arguments_change_nothing(folder):
    segment = build(folder, [[1, 2, 3]])
    cursors = segment.new_cursors(2)
    segment.advance(cursors, np.array([0]), *ragged([[1]]))
    before = cursors.copy()
    with pytest.raises(InputError, match="open"):
        segment.advance(cursors, np.array([0, 2]), *ragged([[1], [1]]))
    with pytest.raises(InputError, match="negative"):
        segment.advance(cursors, np.array([0]), np.array([1, -1], np.int32), np.array([0, 2]))
    assert (cursors == before).all()
    with pytest.raises(InputError, match="negative"):
        documents_of([[1, -5]])


def test_a_long_repeat_takes_bounded_time_and_memory(folder):
    # Quadratic construction or following would take hours here.
    segment = build(folder, [[7] * 200_000, [1, 2] * 50_000])
    segment.verify()
    cursors = segment.new_cursors(1)
    segment.advance(cursors, np.zeros(1, np.int64), *ragged([[7] * 150_000 + [3] + [1, 2] * 40_000 + [2]]))
    assert segment.contexts(cursors, np.zeros(1, np.int64), 1).length[0, 0] == 1

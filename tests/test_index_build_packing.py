"""From raw documents to portions: nothing lost, nothing added, no portion too large; the sizes that memory allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer

from freedraft.retrieval.build import packing, texts
from freedraft.retrieval.build.limits import (
    LARGEST_SEGMENT,
    MAIN_BYTES,
    PARALLEL_SEGMENT,
    SMALLEST_SEGMENT,
    WORKER_BYTES,
    parse_size,
    segment_tokens,
)
from freedraft.retrieval.build.packing import Progress, distinct, pieces, portions, tokenised
from freedraft.retrieval.build.sources import RawDocument
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.construct import BUILD_BYTES_A_TOKEN


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def nothing():
    pass


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=20), st.integers(2, 40))
def test_portions_hold_every_token_once_in_order(rows, size):
    progress = Progress()
    documents = [(f"{i}", np.array(row, np.int32)) for i, row in enumerate(rows)]
    packed = list(portions(pieces(documents, size), size, progress, nothing))
    assert all(0 < len(portion.tokens) + len(portion) <= size for portion in packed) or not any(rows)
    joined: dict[str, list[int]] = {}
    for portion in packed:
        for name, tokens in portion:
            joined.setdefault(name, []).extend(tokens.tolist())
    assert {name: tokens for name, tokens in joined.items() if tokens} == {
        f"{i}": row for i, row in enumerate(rows) if row
    }
    whole = [name for portion in packed for name, tokens in portion if len(tokens) == size - 1]
    assert all(len(rows[int(name)]) >= size - 1 for name in whole)
    cut = sum(-(-len(row) // (size - 1)) for row in rows)
    assert (progress.documents, progress.tokens, progress.segments) == (cut, sum(map(len, rows)), len(packed))


def test_a_document_is_cut_only_if_it_is_too_long_for_any_portion():
    documents = [("a", np.arange(6)), ("b", np.arange(6)), ("c", np.arange(25))]
    packed = list(portions(pieces(documents, 10), 10, Progress(), nothing))
    assert [[(name, len(tokens)) for name, tokens in portion] for portion in packed] == [
        [("a", 6)], [("b", 6)], [("c", 9)], [("c", 9)], [("c", 7)],
    ]  # fmt: skip


def test_tokenised_keeps_order_and_drops_the_empty(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 10)
    ids = np.array([3, 4], np.int32)
    raw = [
        RawDocument("a", "the cat"),
        RawDocument("b", ids),
        RawDocument("c", ""),
        RawDocument("d", "on the mat " * 9),
    ]
    got = list(tokenised(raw, tokenizer))
    assert [name for name, _ in got] == ["a", "b", "d"]
    assert got[1][1] is ids
    assert tokenizer.decode(got[0][1]) == "the cat"
    assert tokenizer.decode(got[2][1]) == "on the mat " * 9


def test_long_texts_are_cut_at_line_ends_to_documents_of_one_name(tokenizer, monkeypatch):
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 12)
    got = list(tokenised([RawDocument("a", "the cat\nsat\non the mat\n")], tokenizer))
    assert [(name, tokenizer.decode(tokens)) for name, tokens in got] == [
        ("a", "the cat\nsat\n"), ("a", "on the mat\n"),
    ]  # fmt: skip


def test_distinct_compares_all_tokens_and_not_names():
    progress = Progress()
    documents = [("a", [1, 2]), ("b", [1, 2]), ("a", [1, 2, 3]), ("c", [2, 1]), ("d", [1, 2])]
    seen: set[bytes] = set()
    kept = distinct([(name, np.array(row, np.int32)) for name, row in documents], seen, progress)
    assert [name for name, _ in kept] == ["a", "a", "c"]
    assert progress.duplicates == 2
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000), ("4GiB", 4 << 30), ("1.5 gib", 3 << 29), ("900MB", 900_000_000), ("2k", 2000),
        ("7 Mi", 7 << 20), ("5B", 5), ("1T", 10**12),
    ],
)  # fmt: skip
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 apples", "1e9", "i", "4Gib ytes", "8388608TiB", "9" * 400])
def test_parse_size_refuses(text):
    with pytest.raises(InputError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize("workers", [0, 1, 2, 16])
def test_segments_fit_into_the_memory(workers):
    for memory in (2 << 30, 8 << 30, 64 << 30):
        try:
            tokens = segment_tokens(memory, workers)
        except InputError:
            assert memory < (8 << 30)
            assert workers == 16
            continue
        building = max(1, workers) * tokens * BUILD_BYTES_A_TOKEN
        assert MAIN_BYTES + workers * WORKER_BYTES + building <= memory
        assert tokens == LARGEST_SEGMENT or building > 0.5 * (memory - MAIN_BYTES - workers * WORKER_BYTES)


def test_too_little_memory_says_how_much_is_enough():
    with pytest.raises(InputError, match=r"100 MiB is too little with 3 workers: at least (\d+) MiB") as caught:
        segment_tokens(100 << 20, 3)
    enough = int(str(caught.value).rpartition("least ")[2].split()[0]) << 20
    assert segment_tokens(enough, 3) >= SMALLEST_SEGMENT
    with pytest.raises(InputError):
        segment_tokens(enough - (2 << 20), 3)


def test_workers_share_a_small_corpus():
    assert segment_tokens(64 << 30, 4, 160_000_000) == 10_000_000
    assert segment_tokens(64 << 30, 4, 1000) == PARALLEL_SEGMENT
    assert segment_tokens(64 << 30, 0, 1000) == segment_tokens(64 << 30, 0)
    assert segment_tokens(64 << 30, 4, 10**12) == segment_tokens(64 << 30, 4)

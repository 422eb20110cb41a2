"""The corpus drafter: against naive chains, over several segments and indexes, and with the right tokenizer only."""

from __future__ import annotations

import json
import random

import huggingface_hub.constants
import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive_corpus import chain
from small_index import create

from freedraft.plugins.base import Drafter, Source
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.index.continuation import SUFFIXES_TRIED
from freedraft.retrieval.index.errors import DamagedError, NotFoundError, TokenizerMismatchError
from freedraft.retrieval.index.fingerprint import tokenizer_fingerprint
from freedraft.retrieval.index.format import NODE_FIELDS, TARGET, Section
from freedraft.retrieval.index.store import CorpusIndex
from freedraft.retrieval.ragged import ragged

EAGER = {"min_probability": 0, "min_expected": 0, "min_match": 1}


@given(strategies.corpora(), st.data())
@settings(max_examples=120, deadline=None)
def test_equals_naive(tmp_path_factory, rows, data):
    text = data.draw(strategies.queries(rows))
    # Beyond, fewer contexts are looked at.
    assume(naive.index_match(rows, text) <= SUFFIXES_TRIED)
    folder = create(tmp_path_factory.mktemp("index") / "i", rows)
    drafter = make_drafter("corpus", {"index": folder, "max_tokens": 5, **EAGER})
    slots = drafter.open(*ragged([text]))
    drafts = drafter.draft(slots, np.array([5], np.int32))
    tokens, probabilities = chain(rows, text, 5)
    assert drafts.tokens.tolist() == tokens
    np.testing.assert_allclose(drafts.probability, probabilities, rtol=1e-5)
    assert drafts.parents.tolist() == list(range(-1, len(tokens) - 1))
    assert set(drafts.source.tolist()) <= {Source.CORPUS}


def test_a_batch_is_its_rows_and_pieces_are_the_whole(tmp_path):
    source = random.Random(1)
    rows = [[source.randrange(6) for _ in range(200)] for _ in range(5)]
    folder = create(tmp_path / "i", rows[:2], rows[2:])
    drafter = make_drafter("corpus", {"index": folder, **EAGER})
    texts = [[source.randrange(6) for _ in range(n)] for n in (0, 40, 3, 17)]
    slots = drafter.open(*ragged([[]] * 4))
    for i in range(40):
        drafter.extend(slots, *ragged([text[i : i + 1] for text in texts]))
    budget = np.array([8, 3, 0, 20], np.int32)
    together = drafter.draft(slots, budget)
    for i, text in enumerate(texts):
        alone = drafter.draft(drafter.open(*ragged([text])), budget[i : i + 1])
        assert together.tokens[together.row(i)].tolist() == alone.tokens.tolist()
        assert len(alone.tokens) <= budget[i]
    drafter.close(slots[:2])
    with pytest.raises(InputError, match="slots"):
        drafter.draft(slots, budget)


def test_the_segment_that_expects_most_is_drafted_from(tmp_path):
    few, many = [[1, 2, 3, 4]], [[1, 2, 7, 8]] * 9
    first, second = create(tmp_path / "first", few), create(tmp_path / "second", many)
    drafter = make_drafter("corpus", {"index": [first, second], **EAGER})
    assert isinstance(drafter, Drafter)
    drafts = drafter.draft(drafter.open(*ragged([[1, 2]])), np.array([2], np.int32))
    assert drafts.tokens.tolist() == [7, 8]


def test_drafts_that_do_not_pay_are_not_made(tmp_path):
    folder = create(tmp_path / "i", [[1, 2, n] for n in range(3, 20)])
    text = ragged([[1, 2]])
    for options, drafted in ((EAGER, 1), ({**EAGER, "min_expected": 0.5}, 0), ({**EAGER, "min_match": 3}, 0)):
        drafter = make_drafter("corpus", {"index": folder, **options})
        assert len(drafter.draft(drafter.open(*text), np.array([4], np.int32)).tokens) == drafted


def test_an_index_of_nothing(tmp_path):
    drafter = make_drafter("corpus", {"index": create(tmp_path / "i"), **EAGER})
    assert len(drafter.draft(drafter.open(*ragged([[1, 2]])), np.array([4], np.int32)).tokens) == 0


def test_a_missing_index_and_no_index(tmp_path):
    with pytest.raises(NotFoundError, match="no index there"):
        make_drafter("corpus", {"index": str(tmp_path)})
    with pytest.raises(ConfigError, match="index"):
        make_drafter("corpus", {})


def test_another_tokenizer_is_refused_naming_both(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    ours = create(tmp_path / "ours", [[1, 2]], fingerprint=tokenizer_fingerprint(path))
    theirs = create(tmp_path / "theirs", [[1, 2]])
    make_drafter("corpus", {"index": ours, "tokenizer": str(path)})
    make_drafter("corpus", {"index": ours, "tokenizer": str(tmp_path)})
    # By the model's name, from the cache of models.
    snapshot = tmp_path / "hub/models--someone--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/models--someone--model/refs").mkdir()
    (tmp_path / "hub/models--someone--model/refs/main").write_text("abc")
    (snapshot / "tokenizer.json").write_bytes(path.read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    make_drafter("corpus", {"index": ours, "tokenizer": "someone/model"})
    for options in (
        {"index": theirs, "tokenizer": str(path)},
        {"index": theirs, "tokenizer": "someone/model"},
        {"index": [ours, theirs]},
    ):
        with pytest.raises(TokenizerMismatchError, match=r"tokenizer of theirs.*tokenizer"):
            make_drafter("corpus", options)


def test_damage_is_found_when_it_is_met(tmp_path):
    folder = create(tmp_path / "i", [[1, 2, 3, 1, 2, 4] * 20])
    index = CorpusIndex(folder)
    path = index.segments[0].path
    place = index.segments[0].header.sections[Section.NODES]
    content = bytearray(path.read_bytes())
    nodes = np.frombuffer(content, np.int32, place.size // 4, place.offset).reshape(-1, NODE_FIELDS)
    nodes[:, TARGET] = 10**9
    path.write_bytes(content)
    drafter = make_drafter("corpus", {"index": folder, **EAGER})
    slots = drafter.open(*ragged([[]]))
    with pytest.raises(DamagedError, match="verify"):
        drafter.extend(slots, *ragged([[1, 2, 3]]))
    assert len(drafter.draft(slots, np.array([4], np.int32)).tokens) == 0

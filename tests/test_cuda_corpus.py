"""Drafting from indexes: the CPU's rows against naive chains here, the CUDA kernel by the same tests in the simulator.

The simulator must be chosen before numba.cuda is imported, and calls Python functions only, so these tests run
themselves again in another process in which Numba compiles nothing.
"""

from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
import scan_batches
import strategies
from cuda_simulator import SIMULATED, assert_passes_simulated
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from naive_corpus import chain
from small_index import create

from freedraft.retrieval.cuda.corpus_rows import REACH, SEEN_FIELDS, draft_rows_on_cpu
from freedraft.retrieval.cuda.rules import Rules
from freedraft.retrieval.index.continuation import SUFFIXES_TRIED
from freedraft.retrieval.index.follow import CURSOR_FIELDS, Automaton
from freedraft.retrieval.index.store import CorpusIndex

WIDTH = 200


class OnCpu:
    """As `DeviceCorpus`, by the reference."""

    def __init__(self, segments, batch, slots, min_match=1):
        self.min_match = min_match
        self.states = [
            (s.automaton, np.zeros((slots, CURSOR_FIELDS), np.int32), np.zeros((slots, SEEN_FIELDS), np.int32))
            for s in segments
        ]

    def draft(self, tokens, lengths, rows, active, drafts, probability, counts, rules):
        limits = rules.limit(drafts.shape[1]), self.min_match, float(np.float32(rules.least))
        for state in self.states:
            draft_rows_on_cpu(*state, tokens, lengths, rows, active, *limits, drafts, probability, counts)


def made(folder, slots=5, min_match=1):
    segments = CorpusIndex(Path(folder)).segments
    if SIMULATED:
        from freedraft.retrieval.cuda.corpus_on_gpu import DeviceCorpus

        return DeviceCorpus(segments, slots, slots, min_match)
    return OnCpu(segments, slots, slots, min_match)


def drafted(corpus, batch, columns=5, rules=None):
    """Drafts (a list a row), their probabilities, and the arrays as they are after an empty scan."""
    rules = rules or Rules()
    drafts = np.full((len(batch.rows), columns), 77, np.int64)
    probability = np.zeros((len(batch.rows), columns), np.float32)
    counts = np.zeros(len(batch.rows), np.int32)
    corpus.draft(*batch, drafts, probability, counts, rules)
    found = [row[:count].tolist() for row, count in zip(drafts, counts, strict=True)]
    return found, probability, drafts


def expected(segments, text, budget):
    """The best chain of the segments, of equally good ones the first."""
    chains = [chain(rows, text, budget) for rows in segments]
    best = max(chains, key=lambda one: np.float32(sum(map(np.float32, one[1]))), default=([], []))
    return best if sum(best[1]) > 0 else ([], [])


@given(st.lists(strategies.corpora(), min_size=1, max_size=2), st.data())
@hypothesis_settings(max_examples=8 if SIMULATED else 100, deadline=None)
def test_equals_naive_step_by_step(tmp_path_factory, segments, data):
    texts = [data.draw(strategies.queries(segments[0])) for _ in range(3)]
    folder = create(tmp_path_factory.mktemp("index") / "i", *segments)
    corpus = made(folder)
    for _ in range(3):
        assume(all(naive.index_match(rows, text) <= SUFFIXES_TRIED for rows in segments for text in texts))
        found, probability, drafts = drafted(corpus, scan_batches.batch(texts, WIDTH))
        for i, text in enumerate(texts):
            tokens, chances = expected(segments, text, 5)
            assert found[i] == tokens
            np.testing.assert_allclose(probability[i], chances + [0] * (5 - len(chances)), rtol=1e-5)
            assert drafts[i, len(tokens) :].tolist() == [text[-1] if tokens else 77] * (5 - len(tokens))
        texts = [text + data.draw(st.lists(st.integers(0, 5), max_size=4)) for text in texts]


def test_a_better_draft_stays(tmp_path):
    corpus = made(create(tmp_path / "i", [[1, 2, 3, 4]] * 6))
    batch = scan_batches.batch([[1, 2], [1, 2]], 16)
    drafts = np.array([[8, 9], [8, 9]], np.int64)
    probability = np.array([[0.9, 0.9], [0.3, 0.1]], np.float32)
    counts = np.array([2, 2], np.int32)
    corpus.draft(*batch, drafts, probability, counts, Rules())
    assert drafts.tolist() == [[8, 9], [3, 4]]
    assert probability[0].tolist() == [np.float32(0.9)] * 2
    assert counts.tolist() == [2, 2]


def test_a_slot_that_changed_its_owner_is_followed_anew(tmp_path):
    rows = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 6, 1, 2, 9, 9]]
    corpus = made(create(tmp_path / "i", rows))
    for text in ([1, 2, 3, 4], [5, 6, 1, 2], [5, 6, 1, 2, 9], [3], [3, 4, 5, 6, 7]):
        assert drafted(corpus, scan_batches.batch([text], 16))[0] == [chain(rows, text, 5)[0]], text


def test_of_a_long_prompt_the_end_is_followed(tmp_path):
    document = list(range(100, 280))
    # What follows the long context differs from what follows the short one that is in the other document.
    rows = [[*document[:150], 7], *[[*document[150 - REACH : 150], 8]] * 9]
    corpus = made(create(tmp_path / "i", rows))
    assert drafted(corpus, scan_batches.batch([document[:150]], WIDTH), 1)[0] == [[8]]
    # Token by token a match may be as long as the text.
    grown = made(create(tmp_path / "other", rows))
    for n in range(1, 151):
        found = drafted(grown, scan_batches.batch([document[:n]], WIDTH), 1)[0]
    assert found == [chain(rows, document[:150], 1)[0]] == [[7]]


def test_rows_that_get_no_draft_are_not_touched(tmp_path):
    corpus = made(create(tmp_path / "i", [[1, 2, 3, 4]] * 3))
    batch = scan_batches.batch([[1, 2], [1, 2], []], 16, rows=[0, 1, 2, 9, -1], active=[0, 1, 1, 1, 1])
    found, _, drafts = drafted(corpus, batch, 2)
    assert found == [[], [3, 4], [], [], []]
    assert drafts[[0, 2, 3, 4]].tolist() == [[77, 77]] * 4


def test_limits(tmp_path):
    corpus = made(create(tmp_path / "i", [[1, 2, 3, 4, 5]] * 20))
    assert drafted(corpus, scan_batches.batch([[1, 2]], 3))[0] == [[3]], "beyond the width"
    assert drafted(corpus, scan_batches.batch([[1, 2]], 16), rules=Rules(budget=2))[0] == [[3, 4]]
    chances = chain([[1, 2, 3, 4, 5]] * 20, [1, 2], 3)[1]
    least = (chances[0] + chances[1]) / 2
    assert drafted(corpus, scan_batches.batch([[1, 2]], 16), rules=Rules(least=least))[0] == [[3]]
    choosy = made(create(tmp_path / "other", [[1, 2, 3, 4, 5]] * 20), min_match=3)
    assert drafted(choosy, scan_batches.batch([[1, 2], [1, 2, 3]], 16))[0] == [[], [4, 5]]


def test_no_text_goes_on_across_what_is_no_token(tmp_path):
    corpus = made(create(tmp_path / "i", [[1, 2, 3, 4, 5]] * 20))
    assert drafted(corpus, scan_batches.batch([[1, 2, -1], [1, -1, 2]], 16))[0] == [[], [3, 4, 5]]


def test_an_index_of_nothing(tmp_path):
    assert drafted(made(create(tmp_path / "i")), scan_batches.batch([[1, 2]], 16))[0] == [[]]


@pytest.mark.skipif(SIMULATED, reason="a device takes verified segments only; this is about the code they share")
def test_a_damaged_segment_drafts_nothing_and_ends(tmp_path):
    text, nodes, edges = CorpusIndex(Path(create(tmp_path / "i", [[1, 2, 3, 1, 2, 4] * 20]))).segments[0].automaton
    generator = np.random.default_rng(3)
    for _ in range(300):
        broken = nodes.copy()
        broken.reshape(-1)[generator.integers(broken.size, size=3)] = generator.integers(-9, 300, 3)
        corpus = OnCpu([], 1, 1)
        corpus.states = [
            (
                Automaton(text, broken, edges),
                np.zeros((1, CURSOR_FIELDS), np.int32),
                np.zeros((1, SEEN_FIELDS), np.int32),
            )
        ]
        for n in range(1, 30):
            found, _, _ = drafted(corpus, scan_batches.batch([([1, 2, 3, 1, 2, 4] * 6)[:n]], 64))
            assert len(found[0]) <= 5


if SIMULATED:
    from freedraft.retrieval.cuda import corpus_on_gpu
    from freedraft.retrieval.errors import CapacityError, InputError
    from freedraft.retrieval.index.errors import CorpusIndexError

    def test_what_does_not_fit_is_refused_before_it_is_uploaded(tmp_path, monkeypatch):
        segments = CorpusIndex(Path(create(tmp_path / "i", [[1, 2, 3]]))).segments
        needed = corpus_on_gpu.DeviceCorpus(segments, 1, 1).bytes
        monkeypatch.setattr(corpus_on_gpu, "free_bytes", lambda: needed)
        with pytest.raises(CapacityError, match="MiB free: build a smaller one"):
            corpus_on_gpu.DeviceCorpus(segments, 1, 1)

    def test_a_damaged_segment_is_refused(tmp_path):
        folder = create(tmp_path / "i", [[1, 2, 3, 1, 2, 4] * 20])
        path = CorpusIndex(Path(folder)).segments[0].path
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(CorpusIndexError):
            corpus_on_gpu.DeviceCorpus(CorpusIndex(Path(folder)).segments, 1, 1)

    def test_tokens_that_the_model_does_not_have_are_refused(tmp_path):
        segments = CorpusIndex(Path(create(tmp_path / "i", [[1, 2, 3]]))).segments
        corpus_on_gpu.DeviceCorpus(segments, 1, 1, vocabulary_size=4)
        with pytest.raises(CorpusIndexError, match=r"token id 3 is not one of 0\.\.2"):
            corpus_on_gpu.DeviceCorpus(segments, 1, 1, vocabulary_size=3)

    def test_a_workspace_refuses_what_it_is_too_small_for(tmp_path):
        corpus = made(create(tmp_path / "i", [[1, 2, 3]]), slots=1)
        with pytest.raises(InputError, match="made for 1 rows of 1 slots, got 2 of 2"):
            drafted(corpus, scan_batches.batch([[1], [2]], 8))

    @pytest.mark.parametrize("bad", [{"batch": 0}, {"slots": 0}, {"min_match": 0}])
    def test_impossible_sizes_are_refused(bad):
        with pytest.raises(InputError, match=r"^device corpus: "):
            corpus_on_gpu.DeviceCorpus([], **{"batch": 1, "slots": 1, **bad})

else:

    def test_the_kernel_passes_these_tests_under_the_simulator():
        assert_passes_simulated(__file__)

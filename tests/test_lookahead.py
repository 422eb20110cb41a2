"""Lookahead decoding: window and pool are those of the reference, and the text is that of plain decoding."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Decoding, RankingTarget

from freedraft.integrations.hf import Speculative
from freedraft.plugins.base import Feedback
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.ragged import ragged

one_thread = tiny.one_thread


def drafter(**options: Any) -> Any:
    return make_drafter("lookahead", {"memory": "1MiB", **options})


def paths(nodes: list[tuple[int, int]]) -> list[list[int]]:
    found: list[list[int]] = []
    for token, parent in nodes:
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


def remember_text(pool: dict[int, list[list[int]]], text: list[int], start: int, n: int, most: int) -> None:
    for end in range(max(start, n - 1), len(text)):
        naive.remember_ngram(pool, text[end - n + 1], text[end - n + 2 : end + 1], most)


@given(
    st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 6), st.integers(1, 5), st.integers(0, 60), st.booleans()
)
@settings(max_examples=60)
def test_equals_naive(seed: int, n: int, width: int, branches: int, budget: int, text: bool) -> None:
    prompts = [[1, 2, 3, 1, 2, 3, 4], [2]]
    made = drafter(ngram=n, window=width, branches=branches, text=text)
    decoding = Decoding(made, RankingTarget(seed, vocabulary=5), prompts)
    pool: dict[int, list[list[int]]] = {}
    references = []
    for prompt in prompts:
        if text:
            remember_text(pool, prompt, 0, n, branches)

        def guess(length: int, place: int, sample: list[int] = prompt) -> int:
            return naive.initial_guess(sample, length, place)

        references.append(naive.Lookahead(n, width, branches, pool, guess))
    for _ in range(12):
        before = [list(committed) for committed in decoding.texts]
        expected = [list(reference.draft(so_far, budget)) for reference, so_far in zip(references, before, strict=True)]
        told, committed = decoding.step(budget)
        assert [paths(nodes) for nodes in decoding.drafts] == expected
        for i, reference in enumerate(references):
            argmax = told[i].argmax
            assert argmax is not None
            reference.move(argmax.tolist(), len(committed[i]))
            if text:
                remember_text(pool, before[i] + committed[i], len(before[i]), n, branches)


@pytest.mark.parametrize("shape", ["tree", "chain"])
@pytest.mark.parametrize("text", [True, False])
def test_text_is_that_of_plain_decoding_in_fewer_steps(shape: str, text: bool) -> None:
    decoding = Decoding(drafter(shape=shape, text=text), RankingTarget(3, order=1), [[1], [2, 3], [5]])
    decoding.run(80, 60)
    assert decoding.tokens_per_step > 2


def test_the_window_finds_what_the_text_never_had() -> None:
    # A cycle of 40 tokens, seen for the first time: no n-gram of the text helps, and the prompt has all the tokens.
    target = RankingTarget(0, vocabulary=40, order=1)
    target.ranking = lambda text: [(text[-1] + 1 + i) % 40 for i in range(40)]  # type: ignore[method-assign]
    prompt = list(range(39, -1, -1))
    decoding = Decoding(drafter(text=False), target, [prompt])
    decoding.run(36, 60)
    assert decoding.tokens_per_step > 1.5


def test_the_window_is_a_trunk_with_a_branch_for_each_column() -> None:
    made = drafter(ngram=4, window=3, branches=2, text=False, initial="random")
    slots = made.open(*ragged([[10**6, 1, 2, 3]]))
    drafts = made.draft(slots, np.array([60], np.int32))
    assert drafts.parents.tolist() == [-1, 0, 1, 0, 3, 4, 3, 6, 7]
    # Behind trunk tokens 0, 3 and 6 hang two more tokens each; the target now gives each column its next one.
    argmax = np.arange(100, 110, dtype=np.int32)
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 10]), argmax))
    before = made._sequences.window[slots[0]].copy()
    made.extend(slots, *ragged([[100]]))
    after = made._sequences.window[slots[0]]
    assert after[:2].tolist() == before[1:].tolist()
    assert after[2].tolist() == [103, 106, 109]


def test_a_chain_is_the_newest_ngram_and_then_the_window() -> None:
    made = drafter(shape="chain", ngram=3, window=4, branches=2)
    slots = made.open(*ragged([[1, 2, 3, 1, 4, 5, 1]]))
    drafts = made.draft(slots, np.array([60], np.int32))
    assert drafts.parents.tolist() == [-1, 0, 1, 2, 3]
    assert drafts.tokens[:2].tolist() == [4, 5]
    assert made._sequences.window[slots[0]][1, 1:].tolist() == drafts.tokens[2:].tolist()
    short = made.draft(slots, np.array([1], np.int32))
    assert short.tokens.tolist() == [4]


def test_a_small_budget_is_shared_by_window_and_branches() -> None:
    made = drafter(ngram=4, window=10, branches=10)
    slots = made.open(*ragged([[1, 2, 3, 4, 1, 5, 6, 7, 1, 8, 9, 10, 1]]))
    for budget in range(60):
        drafts = made.draft(slots, np.array([budget], np.int32))
        assert len(drafts.tokens) <= budget
        if budget >= 15:
            assert {5, 8} <= set(drafts.tokens[drafts.parents == -1].tolist())
        if budget >= 6:
            assert made._sequences.leaf[slots[0], 0] >= 0


def test_a_later_sequence_knows_the_ngrams_of_an_earlier_one() -> None:
    made, target = drafter(), RankingTarget(9, vocabulary=60, order=1)
    first = Decoding(made, target, [[1, 2]])
    first.run(12, 60)
    second = Decoding(made, target, [[1, 2]])
    second.run(12, 60)
    assert second.passes < first.passes


def test_with_scope_off_an_ngram_is_its_sequences_alone() -> None:
    for scope, expected in (("engine", [2, 3, 4]), ("off", [])):
        made = drafter(scope=scope, window=1, branches=1)
        slots = made.open(*ragged([[1, 2, 3, 4, 1]]))
        own = made.draft(slots, np.array([3], np.int32))
        assert own.tokens.tolist() == [2, 3, 4]
        other = made.open(*ragged([[7, 1]]))
        drafts = made.draft(other, np.array([3], np.int32))
        assert [token for token in drafts.tokens.tolist() if token in (2, 3, 4)] == expected


def test_memory_is_bounded() -> None:
    made = drafter(memory="4KiB", ngram=3, branches=2)
    size = made.pool.rows.nbytes
    assert size <= 4096
    slots = made.open(*ragged([[*range(1000), 997]]))
    assert made.pool.rows.nbytes == size
    assert {998} <= set(made.draft(slots, np.array([60], np.int32)).tokens.tolist())
    Decoding(made, RankingTarget(2, vocabulary=300), [[1]]).run(60, 60)


@pytest.mark.parametrize("shown", [3, 8])
def test_a_tree_that_was_cut_fills_no_column(shown: int) -> None:
    made = drafter(ngram=4, window=3, branches=2, text=False, initial="random")
    slots = made.open(*ragged([[10**6, 1, 2, 3]]))
    assert len(made.draft(slots, np.array([60], np.int32)).tokens) == 9
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, shown]), np.arange(shown, dtype=np.int32)))
    made.extend(slots, *ragged([[0]]))
    assert (made._sequences.age[slots[0]] == -1).all()


def test_mistakes_are_told() -> None:
    made = drafter()
    slots = made.open(*ragged([[1], [2]]))
    with pytest.raises(InputError, match="needs argmax"):
        made.observe(slots, Feedback(np.zeros(2, np.int32), np.array([0, 1, 2])))
    with pytest.raises(InputError, match="one a slot"):
        made.draft(slots, np.array([1], np.int32))
    with pytest.raises(InputError, match="negative"):
        made.open(np.array([-5], np.int32), np.array([0, 1]))
    made.close(slots)
    with pytest.raises(InputError, match="open"):
        made.draft(slots, np.array([1, 1], np.int32))
    with pytest.raises(ConfigError, match="ngram"):
        drafter(ngram=1)


@pytest.mark.parametrize("shape", ["tree", "chain"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7}])
def test_generate_is_lossless(shape: str, options: dict[str, Any]) -> None:
    model, prompt = tiny.model(), tiny.prompt(20)
    expected = tiny.plain(model, prompt, 3, max_new_tokens=60, **options)
    ours = Speculative("lookahead", shape=shape, memory="1MiB")
    for _ in range(2):
        actual = tiny.speculative(model, prompt, ours, 3, max_new_tokens=60, **options)
        assert actual.tolist() == expected.tolist()
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.tokens_per_step > 1.1

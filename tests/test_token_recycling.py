"""Token recycling: equal to the reference, lossless, bounded, calibrated."""

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
from freedraft.plugins.token_recycling import PRIOR, PRIOR_WEIGHT
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.ragged import ragged

one_thread = tiny.one_thread


def drafter(**options: Any) -> Any:
    return make_drafter("token_recycling", {"memory": "1MiB", **options})


@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(),
    st.integers(0, 25),
)  # fmt: skip
@settings(max_examples=60)
def test_equals_naive(seed: int, context: int, k: int, fresh: int, text: bool, chain: bool, budget: int) -> None:
    options = {"context": context, "k": k, "fresh": fresh, "text": text}
    made = drafter(**options, shape="chain" if chain else "tree", min_probability=0.01, max_tokens=20)
    reference = naive.Recycling(
        **options, floor=0.01, chain=chain, belief=PRIOR.tolist(), weight=PRIOR_WEIGHT
    )  # fmt: skip
    decoding = Decoding(made, RankingTarget(seed, vocabulary=5, sure=0.8), [[1, 2, 3, 1, 2], [], [4]], k=6)
    for prompt in decoding.prompts:
        reference.committed([], prompt, judged=False)
    for _ in range(8):
        before = [list(text) for text in decoding.texts]
        expected = [reference.draft(text, min(budget, 20)) if text else [] for text in before]
        told, committed = decoding.step(budget)
        assert decoding.drafts == [[node[:2] for node in nodes] for nodes in expected]
        for given_, nodes in zip(decoding.probability, expected, strict=True):
            assert given_ == pytest.approx([node[2] for node in nodes], rel=1e-5)
        for i, feedback in enumerate(told):
            assert feedback.top_k is not None
            reference.committed(before[i], committed[i], judged=True)
            reference.learn(before[i], decoding.drafts[i], feedback.top_k.tolist())


@pytest.mark.parametrize("shape", ["tree", "chain"])
def test_text_is_that_of_plain_decoding_in_fewer_steps(shape: str) -> None:
    decoding = Decoding(drafter(shape=shape), RankingTarget(3, order=1), [[1], [2, 3], [5]])
    decoding.run(60, 60)
    # A ranking of one token's context repeats itself soon, and then all is known.
    assert decoding.tokens_per_step > 3


def test_rejected_nodes_teach() -> None:
    made = drafter(context=1, text=False)
    target = RankingTarget(1, order=1)
    slots = made.open(*ragged([[0]]))

    def feedback(*ranked: list[int]) -> Feedback:
        return Feedback(np.array([0], np.int32), np.array([0, len(ranked)]), None, np.array(ranked, np.int32))

    made.draft(slots, np.array([9], np.int32))
    made.observe(slots, feedback([1, 2, 3]))
    made.extend(slots, *ragged([[0]]))
    drafts = made.draft(slots, np.array([3], np.int32))
    assert drafts.tokens.tolist() == [1, 2, 3]
    # 0 follows again: all three were rejected, and all the same it is known now what follows them.
    made.observe(slots, feedback([1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 1]))
    made.extend(slots, *ragged([[0]]))
    drafts = made.draft(slots, np.array([60], np.int32))
    followers = {drafts.tokens[p].item(): set() for p in drafts.parents if p >= 0}
    for token, parent in zip(drafts.tokens, drafts.parents, strict=True):
        if parent >= 0:
            followers[drafts.tokens[parent].item()].add(token.item())
    assert followers[1] >= {4, 5}
    assert followers[2] >= {7}
    assert target.vocabulary == 12


def test_a_later_sequence_knows_what_an_earlier_one_showed() -> None:
    made, target = drafter(), RankingTarget(9, vocabulary=40)
    first = Decoding(made, target, [[1, 2]])
    first.run(30, 60)
    second = Decoding(made, target, [[1, 2]])
    second.run(30, 60)
    assert second.passes < first.passes / 2
    alone = Decoding(drafter(), target, [[1, 2]])
    alone.run(30, 60)
    assert alone.passes == first.passes


def test_with_scope_off_a_row_is_its_sequences_alone() -> None:
    for scope, expected in (("engine", [5, 6]), ("off", [])):
        made = drafter(scope=scope)
        made.open(*ragged([[4, 5, 6]]))
        other = made.open(*ragged([[9, 4]]))
        assert made.draft(other, np.array([2], np.int32)).tokens.tolist() == expected


def test_probabilities_are_calibrated() -> None:
    decoding = Decoding(drafter(context=2), RankingTarget(5, vocabulary=8, sure=0.7), [[1], [2], [3]])
    decoding.run(300, 20)
    start = len(decoding.outcomes)
    decoding.run(900, 20)
    outcomes = np.array(decoding.outcomes[start:])
    # The first of a ranking is committed in 0.7 + 0.3 / 4 of cases, the second in 0.3 / 4.
    for low, high, fewest in ((0.6, 1.0, 500), (0.04, 0.2, 500)):
        chosen = outcomes[(outcomes[:, 0] >= low) & (outcomes[:, 0] < high)]
        assert len(chosen) > fewest
        assert chosen[:, 0].mean() == pytest.approx(chosen[:, 1].mean(), abs=0.05)


def test_likeliest_nodes_first() -> None:
    decoding = Decoding(drafter(), RankingTarget(6), [[1, 2, 3]])
    for _ in range(10):
        decoding.step(30)
    probability = decoding.probability[0]
    assert len(probability) == 30
    assert probability == sorted(probability, reverse=True)
    assert max(parent for _, parent in decoding.drafts[0]) > 0


@pytest.mark.parametrize("clock", [0, 2**31 - 500, 2**32 - 500])
def test_memory_is_bounded_and_the_newest_rows_stay(clock: int) -> None:
    made = drafter(memory="4KiB", context=1)
    # The clock of the rows has 32 bits, and goes round.
    made.table.clock[0] = clock
    rows = len(made.table.rows)
    assert made.table.rows.nbytes <= 4096
    slots = made.open(*ragged([list(range(1000)), [998, 999, 998, 999]]))[1:]
    held = {int(row[3]) for row in made.table.rows if row[0]}
    assert len(held) > 0.9 * rows
    assert min(held) > 1000 - 3 * rows
    assert len(made.table.rows) == rows
    assert made.draft(slots, np.array([1], np.int32)).tokens.tolist() == [998]
    Decoding(made, RankingTarget(2, vocabulary=300), [[1]]).run(100, 30)


NOTHING = [-1, -1]


@pytest.mark.parametrize(
    ("shape", "ranked", "after_5", "after_7"),
    [
        # Nobody knows which nodes of a tree these are; a chain is cut at its end.
        ("tree", [[8, 9], [10, 11]], 8, 5),
        ("chain", [[8, 9], [10, 11]], 8, 10),
        ("tree", [[8, 9], [10, 11], [12, 13], [14, 15]], 12, 10),
        ("tree", [[8, 9], NOTHING, NOTHING, [14, 15]], 8, 5),
        ("tree", [NOTHING, [10, 11], NOTHING, NOTHING], 7, 10),
    ],
)
def test_what_was_not_verified_teaches_nothing(shape: str, ranked: list[list[int]], after_5: int, after_7: int) -> None:
    made = drafter(shape=shape, context=1, k=2, min_probability=0.0)
    slots = made.open(*ragged([[5, 6, 5, 7, 5]]))
    drafts = made.draft(slots, np.array([3], np.int32))
    assert drafts.tokens.tolist() == ([7, 5, 6] if shape == "tree" else [7, 5, 7])
    assert drafts.parents.tolist() == ([-1, 0, -1] if shape == "tree" else [-1, 0, 1])
    told = Feedback(np.array([0], np.int32), np.array([0, len(ranked)]), None, np.array(ranked, np.int32))
    made.observe(slots, told)
    made.extend(slots, *ragged([[20]]))
    for last, expected in ((5, after_5), (7, after_7)):
        asked = made.open(*ragged([[last]]))
        assert made.draft(asked, np.array([1], np.int32)).tokens.tolist() == [expected]


def test_what_was_committed_teaches_even_where_a_tree_was_cut() -> None:
    made = drafter(context=1, k=2, min_probability=0.0)
    slots = made.open(*ragged([[5, 6, 5, 7, 5]]))
    assert made.draft(slots, np.array([3], np.int32)).tokens.tolist() == [7, 5, 6]
    # One node of the three was verified, and accepted: 6, which 30 followed.
    told = Feedback(np.array([1], np.int32), np.array([0, 2]), None, np.array([[6, 8], [30, 9]], np.int32))
    made.observe(slots, told)
    made.extend(slots, *ragged([[6, 30]]))
    for last, expected in ((5, [6, 8]), (6, [30, 5]), (7, [5])):
        asked = made.open(*ragged([[last]]))
        drafts = made.draft(asked, np.array([9], np.int32))
        assert drafts.tokens[drafts.parents == -1].tolist() == expected


def test_prompts_teach_only_if_asked() -> None:
    prompt = [1, 2, 3, 1]
    for text, expected in ((True, [2, 3, 1]), (False, [])):
        made = drafter(text=text, shape="chain", min_probability=0.01)
        drafts = made.draft(made.open(*ragged([prompt])), np.array([3], np.int32))
        assert drafts.tokens.tolist() == expected


def test_mistakes_are_told() -> None:
    made = drafter()
    slots = made.open(*ragged([[1], [2]]))
    with pytest.raises(InputError, match="one a slot"):
        made.draft(slots, np.array([1], np.int32))
    with pytest.raises(InputError, match="negative"):
        made.extend(slots, np.array([-1, 2], np.int32), np.array([0, 1, 2]))
    with pytest.raises(InputError, match="needs top_k"):
        made.observe(slots, Feedback(np.zeros(2, np.int32), np.array([0, 1, 2])))
    with pytest.raises(InputError, match="twice"):
        made.close(slots[[0, 0]])
    made.close(slots[:1])
    with pytest.raises(InputError, match="open"):
        made.draft(slots, np.array([1, 1], np.int32))
    with pytest.raises(InputError, match="open"):
        made.extend(np.array([99]), *ragged([[1]]))
    with pytest.raises(ConfigError, match="context"):
        drafter(context=5)


@pytest.mark.parametrize("shape", ["tree", "chain"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7}])
def test_generate_is_lossless(shape: str, options: dict[str, Any]) -> None:
    model, prompt = tiny.model(), tiny.prompt(20)
    expected = tiny.plain(model, prompt, 3, max_new_tokens=80, **options)
    ours = Speculative("token_recycling", shape=shape, memory="1MiB")
    # Twice, for the second time the rows are full.
    for _ in range(2):
        actual = tiny.speculative(model, prompt, ours, 3, max_new_tokens=80, **options)
        assert actual.tolist() == expected.tolist()
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    # A sample is less often what the rows say.
    assert ours.statistics.tokens_per_step > (1.1 if options else 1.5)


@pytest.mark.model
@pytest.mark.parametrize("name", ["token_recycling", "lookahead", "jacobi"])
@pytest.mark.parametrize("sampling", [False, True])
def test_a_chat_model_answers_as_ever(model: Any, tokenizer: Any, name: str, sampling: bool) -> None:
    messages = [{"role": "user", "content": "Name three fruits, then name them again."}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": 20, "do_sample": sampling, "temperature": 1.0}
    expected = tiny.plain(model, None, 1, **inputs, **options)
    ours = Speculative(name)
    assert tiny.speculative(model, None, ours, 1, **inputs, **options).tolist() == expected.tolist()
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.drafted > 0

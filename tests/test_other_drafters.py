"""Other drafters as sources of fusion: each is believed as far as it was right, and learns from fusion's drafts."""

from __future__ import annotations

import random
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import tiny
from drafters import Scripted, tree
from hypothesis import given
from hypothesis import strategies as st
from scripted import Decoding, RankingTarget

from freedraft.integrations.hf import Speculative
from freedraft.plugins import registry
from freedraft.plugins.adjacency import NO_TOKEN
from freedraft.plugins.base import Drafts, Feedback, FollowsDrafts, Source
from freedraft.plugins.evidence import LIKELIEST, MATCHED, empty_evidence
from freedraft.plugins.proposals import (
    CHILDREN,
    follow_proposals,
    gather_proposals,
    keep_proposals,
    no_proposals,
    to_start,
)
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.ragged import ragged

one_thread = tiny.one_thread


def fusion(drafters: dict[str, Any], **options: Any) -> Any:
    # A text of its own alone: what is drafted beyond that is the other drafters'.
    return make_drafter("fusion", {"memory": "8MiB", "scope": "off", "drafters": drafters} | options)


@pytest.fixture
def oracles(monkeypatch: pytest.MonkeyPatch) -> list[Scripted]:
    """Drafters under the names `right`, `wrong` and `cheat`; returns those that were made."""
    target = RankingTarget(0, vocabulary=500, order=9)
    made: list[Scripted] = []
    dice = random.Random(0)

    def right(text: list[int], budget: int) -> list[int]:
        return target.reply(text, min(budget, 4))

    def wrong(text: list[int], budget: int) -> list[int]:
        return [dice.randrange(500) for _ in range(min(budget, 4))]

    class Oracle(Scripted):
        def __init__(self, propose: Any) -> None:
            super().__init__(propose)
            made.append(self)

    class Learning(Oracle):
        feedback = frozenset({"argmax"})

    class Entry:
        def __init__(self, cls: Any, propose: Any) -> None:
            self.value, self._cls, self._propose = "tests:Oracle", cls, propose

        def load(self) -> Any:
            cls, propose = self._cls, self._propose

            class Loaded(cls):  # type: ignore[misc]
                def __init__(self, settings: Any) -> None:
                    super().__init__(propose)

            return Loaded

    known = dict(registry._installed())
    extra: dict[str, Any] = {
        "right": Entry(Oracle, right),
        "wrong": Entry(Oracle, wrong),
        "cheat": Entry(Learning, right),
    }
    installed: dict[str, EntryPoint] = {**known, **extra}
    monkeypatch.setattr(registry, "_installed", lambda: installed)
    return made


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 8)), max_size=10), st.lists(st.integers(0, 3), max_size=5))
def test_what_a_tree_proposes_behind_a_path(nodes: list[tuple[int, int]], path: list[int]) -> None:
    nodes = [(token, min(parent, i - 1)) for i, (token, parent) in enumerate(nodes)]
    proposals = no_proposals(2, 10)
    proposals = type(proposals)(*(np.zeros((4, *array.shape[1:]), np.int32) for array in proposals))
    drafts = tree(nodes)
    keep_proposals(proposals, 1, np.array([3]), drafts.tokens, drafts.parents, drafts.probability, drafts.offsets)
    at = np.empty((2, 2), np.int64)
    to_start(proposals, 3, at)
    place: int | None = -1 if nodes else None
    for token in path:
        follow_proposals(proposals, 3, at, token)
        children = [i for i, node in enumerate(nodes) if place is not None and node == (token, place)]
        place = children[0] if children else None
    evidence = empty_evidence()
    rows = gather_proposals(proposals, 3, at, evidence, 2)
    expected = [token for token, parent in nodes if place is not None and parent == place][:CHILDREN]
    assert evidence[2:rows, LIKELIEST].tolist() == expected
    assert (evidence[2:rows, MATCHED] == len(path) + 1).all()


def test_a_drafter_that_is_right_is_believed_and_one_that_is_wrong_is_not(oracles: list[Scripted]) -> None:
    target = RankingTarget(0, vocabulary=500, order=9)
    lonely = Decoding(fusion({}), target, [[1, 2, 3]])
    lonely.run(60, 8)
    assert lonely.tokens_per_step == 1.0
    believed = Decoding(fusion({"right": {}, "wrong": {}}), target, [[1, 2, 3], [4]])
    believed.run(200, 8)
    assert believed.tokens_per_step > 4
    assert min(likelihood[0] for likelihood in believed.probability) > 0.8
    misled = Decoding(fusion({"wrong": {}}), target, [[1, 2, 3]])
    misled.run(200, 8)
    # Its word was good for a while; then it is left alone.
    assert sum(map(len, misled.drafts)) == 0


def test_trees_take_proposals_too(oracles: list[Scripted]) -> None:
    decoding = Decoding(
        fusion({"wrong": {}, "right": {}}, shape="tree"), RankingTarget(0, vocabulary=500, order=9), [[1, 2, 3]]
    )
    decoding.run(100, 8)
    assert decoding.tokens_per_step > 4


def test_the_other_drafters_see_every_token_and_are_closed(oracles: list[Scripted]) -> None:
    made = fusion({"right": {}})
    slots = made.open(*ragged([[1, 2], [3], []]))
    (other,) = oracles
    made.extend(slots[[2, 0]], *ragged([[7], [8, 9]]))
    made.draft(slots, np.array([2, 0, 1], np.int32))
    made.close(slots[:2])
    assert other.closed == [[1, 2, 8, 9], [3]]
    again = made.open(*ragged([[5]]))
    drafts = made.draft(np.concatenate([again, slots[2:]]), np.array([4, 4], np.int32))
    assert set(drafts.source.tolist()) <= {Source.BY_PRODUCT}
    assert sorted(other.texts.values()) == [[5], [7]]


def test_a_draft_is_used_up_by_what_is_committed(oracles: list[Scripted]) -> None:
    made = fusion({"right": {}})
    slots = made.open(*ragged([[1, 2]]))
    assert len(made.draft(slots, np.array([4], np.int32)).tokens)
    made.extend(slots, *ragged([[3]]))
    assert (made._others.proposals.nodes[slots] == 0).all()


@pytest.mark.parametrize("name", ["jacobi", "lookahead"])
def test_by_products_of_fusions_own_drafts_become_guesses(name: str) -> None:
    # Each token depends on its place alone, so that what the target predicts behind a wrong token is right.
    class Counting(RankingTarget):
        def ranking(self, text: Any) -> list[int]:
            return [(3 * len(text) + i) % self.vocabulary for i in range(self.vocabulary)]

    target = Counting(0, vocabulary=97)
    # The text promises what does not come.
    prompt = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    with_it = Decoding(fusion({name: {}}, min_probability=0), target, [prompt])
    without = Decoding(fusion({}, min_probability=0), target, [prompt])
    for decoding in (with_it, without):
        decoding.run(90, 8)
    assert with_it.passes < without.passes


def test_jacobi_takes_its_iterate_from_a_draft_that_it_adopted() -> None:
    made = make_drafter("jacobi", {"max_tokens": 3})
    assert isinstance(made, FollowsDrafts)
    slots = made.open(*ragged([[9, 9]]))
    made.draft(slots, np.array([3], np.int32))
    # 5 - 6 - 7 and, less likely, 8 behind the text.
    drafts = tree([(5, -1), (6, 0), (7, 1), (8, -1)])
    made.adopt(slots, drafts)
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 5]), np.array([4, 20, 21, 22, 23], np.int32)))
    made.extend(slots, *ragged([[4]]))
    # What was predicted behind the likeliest node that stood where 4 stands now, then behind its child.
    assert made.draft(slots, np.array([3], np.int32)).tokens.tolist() == [20, 21, 22]
    made.adopt(slots, drafts)
    made.observe(slots, Feedback(np.ones(1, np.int32), np.array([0, 5]), np.array([8, 20, 21, 22, 23], np.int32)))
    made.extend(slots, *ragged([[8, 23]]))
    # Nothing was verified behind 8 but the token that was committed.
    assert made.draft(slots, np.array([3], np.int32)).tokens.tolist() == [9, 9, 9]
    with pytest.raises(InputError, match="one a slot"):
        made.adopt(slots, Drafts.empty(2))


def test_lookahead_takes_ngrams_and_columns_from_a_draft_that_it_adopted() -> None:
    made = make_drafter("lookahead", {"memory": "1MiB", "ngram": 3, "window": 2, "initial": "random", "text": False})
    assert isinstance(made, FollowsDrafts)
    slots = made.open(*ragged([[10**6, 1, 2]]))
    window = made.draft(slots, np.array([60], np.int32))
    kept = made._sequences
    column = [int(kept.window[slots[0], i, 0]) for i in range(2)]
    made.adopt(slots, tree([(40, -1), (column[0], -1), (column[1], 1), (41, 0)]))
    assert kept.leaf[slots[0]].tolist() == [2, -1]
    argmax = np.array([3, 50, 51, 52, 53], np.int32)
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 5]), argmax))
    made.extend(slots, *ragged([[3]]))
    assert kept.window[slots[0], :, 0].tolist() == [column[1], 52]
    # N-grams that begin with 2 and with 40 are in the pool, the newest first.
    for last, expected in ((2, [column[0], 51, 40, 50]), (40, [41, 53])):
        made.extend(slots, *ragged([[last]]))
        drafts = made.draft(slots, np.array([60], np.int32))
        assert drafts.tokens[: len(expected)].tolist() == expected
    assert len(window.tokens)
    with pytest.raises(InputError, match="one a slot"):
        made.adopt(slots, Drafts.empty(2))


def test_a_chain_that_was_cut_may_be_adopted() -> None:
    for name in ("jacobi", "lookahead"):
        made = make_drafter(name, {})
        slots = made.open(*ragged([[9, 9]]))
        made.draft(slots, np.array([3], np.int32))
        made.adopt(slots, tree([(5, -1), (6, 0), (7, 1)]))
        made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 2]), np.array([4, 20], np.int32)))
        made.extend(slots, *ragged([[4]]))
        made.adopt(slots, Drafts.empty(1))
        made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 1]), np.array([6], np.int32)))
        made.extend(slots, *ragged([[6]]))
        assert made.draft(slots, np.array([1], np.int32)).rows == 1


def test_mistakes_are_told(oracles: list[Scripted]) -> None:
    for drafters, message in (
        ({"token_recycling": {}}, "own drafts alone; use `recycling: true`"),
        ({"cheat": {}}, "own drafts alone$"),
        ({"nothing": {}}, "unknown drafter"),
        ({"jacobi": {"no": 1}}, "no"),
    ):
        with pytest.raises(ConfigError, match=message):
            fusion(drafters)


def test_feedback_is_what_any_of_them_needs() -> None:
    assert fusion({}).feedback == frozenset()
    assert fusion({"prompt_lookup": {}}).feedback == frozenset()
    assert fusion({"jacobi": {}}, recycling=True).feedback == {"accepted", "argmax", "top_k"}


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7}])
def test_generate_writes_the_same_text(shape: str, sampling: dict[str, Any]) -> None:
    model, prompt = tiny.model(), tiny.prompt(20)
    expected = tiny.plain(model, prompt, 3, max_new_tokens=60, **sampling)
    ours = Speculative(
        "fusion", shape=shape, recycling=True, drafters={"jacobi": {}, "lookahead": {}}, pacing=False, min_probability=0
    )
    actual = tiny.speculative(model, prompt, ours, 3, max_new_tokens=60, **sampling)
    assert actual.tolist() == expected.tolist()
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.drafted > 60
    assert NO_TOKEN not in actual.tolist()

"""Other drafters as sources of fusion: each is believed as far as it was right, and learns from fusion's drafts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import naive
import numpy as np
import pytest
import tiny
from drafters import MALFORMED, Branching, Malformed, Scripted, tree
from hypothesis import assume, given
from hypothesis import strategies as st
from mixer_twin import assert_same_knowledge, twin
from scripted import Decoding, RankingTarget

from freedraft.integrations.guard import Guard
from freedraft.integrations.hf import Speculative
from freedraft.plugins import registry
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
from freedraft.plugins.verified import FOLLOWED
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.ragged import ragged

one_thread = tiny.one_thread


def fusion(drafters: dict[str, Any], **options: Any) -> Any:
    # A text of its own alone: what is drafted beyond that is the other drafters'.
    return make_drafter("fusion", {"memory": "8MiB", "scope": "off", "drafters": drafters} | options)


@contextmanager
def registered(**drafters: Scripted) -> Iterator[None]:
    """Make these drafters those that are built by these names."""

    class Entry:
        def __init__(self, made: Scripted) -> None:
            self.value, self._made = "tests:Scripted", made

        def load(self) -> Any:
            made = self._made

            class Loaded(type(made)):  # type: ignore[misc]
                def __new__(cls, settings: Any) -> Any:
                    return made

            return Loaded

    known: dict[str, Any] = dict(registry._installed())
    with pytest.MonkeyPatch.context() as patch:
        entries = {name: Entry(made) for name, made in drafters.items()}
        patch.setattr(registry, "_installed", lambda: {**known, **entries})
        yield


TARGET = RankingTarget(0, vocabulary=500, order=9)


def right() -> Scripted:
    return Scripted(lambda text, budget: TARGET.reply(text, min(budget, 4)))


def wrong() -> Scripted:
    dice = random.Random(0)
    return Scripted(lambda text, budget: [dice.randrange(500) for _ in range(min(budget, 4))])


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


NODES = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 6)), max_size=7)


@given(
    st.lists(st.integers(0, 3), max_size=8),
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=4), NODES, NODES), max_size=8),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.3]),
)
def test_equals_naive(prompt: list[int], steps: list[Any], budget: int, least: float) -> None:
    trees = iter([(first, second) for _, first, second in steps])
    now: list[Any] = [[], []]

    def grow(which: int) -> Any:
        def grown(text: list[int], budget: int) -> list[tuple[int, int]]:
            return [(token, min(parent, i - 1)) for i, (token, parent) in enumerate(now[which])][:budget]

        return grown

    drafters = [Branching(grow(0)), Branching(grow(1))]
    with registered(first=drafters[0], second=drafters[1]):
        ours = fusion({"first": {}, "second": {}}, min_probability=least, max_tokens=8)
    mixing = twin()
    expected = naive.Fusing(mixing, prompt)
    slots = ours.open(*ragged([prompt]))
    for committed, _, _ in steps:
        now[:] = next(trees)
        expected.proposals = []
        for which in range(2):
            drafts = tree(grow(which)([], budget))
            columns = drafts.tokens.tolist(), drafts.parents.tolist(), drafts.probability.tolist()
            expected.proposals.append(list(zip(*columns, strict=True)))
        drafts = ours.draft(slots, np.array([budget], np.int32))
        tokens, probabilities = expected.draft(budget, least)
        assume(not expected.tied)
        assert drafts.tokens.tolist() == tokens
        assert drafts.probability == pytest.approx(probabilities, rel=1e-5)
        ours.extend(slots, *ragged([committed]))
        if committed:
            expected.extend(committed)
        assume(not expected.tied)
    assert_same_knowledge(ours.mixer, mixing)


def test_a_drafter_that_is_right_is_believed_and_one_that_is_wrong_is_not() -> None:
    lonely = Decoding(fusion({}), TARGET, [[1, 2, 3]])
    lonely.run(60, 8)
    assert lonely.tokens_per_step == 1.0
    with registered(right=right(), wrong=wrong()):
        believed = Decoding(fusion({"right": {}, "wrong": {}}), TARGET, [[1, 2, 3], [4]])
        misled = Decoding(fusion({"wrong": {}}), TARGET, [[1, 2, 3]])
    believed.run(200, 8)
    assert believed.tokens_per_step > 4
    assert min(likelihood[0] for likelihood in believed.probability) > 0.8
    misled.run(200, 8)
    # Its word was good for a while; then it is left alone.
    assert sum(map(len, misled.drafts)) == 0


def test_trees_take_proposals_too() -> None:
    with registered(right=right(), wrong=wrong()):
        decoding = Decoding(fusion({"wrong": {}, "right": {}}, shape="tree"), TARGET, [[1, 2, 3]])
    decoding.run(100, 8)
    assert decoding.tokens_per_step > 4


def test_the_other_drafters_see_every_token_and_are_closed() -> None:
    other = right()
    with registered(right=other):
        made = fusion({"right": {}}, min_probability=0)
    slots = made.open(*ragged([[1, 2], [3], []]))
    made.extend(slots[[2, 0]], *ragged([[7], [8, 9]]))
    assert np.diff(made.draft(slots, np.array([2, 0, 1], np.int32)).offsets).tolist() == [2, 0, 1]
    made.close(slots[:2])
    assert other.closed == [[1, 2, 8, 9], [3]]
    # More sequences than there was room for; the first has a slot that another had.
    again = made.open(*ragged([[5]] * 20))
    drafts = made.draft(np.concatenate([again, slots[2:]]), np.full(21, 4, np.int32))
    assert drafts.tokens[drafts.row(0)].tolist() == drafts.tokens[drafts.row(19)].tolist() == TARGET.reply([5], 4)
    assert drafts.tokens[drafts.row(20)].tolist() == TARGET.reply([7], 4)
    assert set(drafts.source.tolist()) == {Source.BY_PRODUCT}


def test_of_a_long_draft_the_beginning_counts() -> None:
    long = list(range(100, 200))
    with registered(long=Scripted(lambda text, budget: long[:budget])):
        made = fusion({"long": {}}, min_probability=0, max_tokens=128)
    slots = made.open(*ragged([[1]]))
    drafts = made.draft(slots, np.array([128], np.int32))
    assert drafts.tokens.tolist() == long[:FOLLOWED]


def test_a_draft_is_used_up_by_what_is_committed() -> None:
    with registered(right=right()):
        made = fusion({"right": {}})
    slots = made.open(*ragged([[1, 2]]))
    assert len(made.draft(slots, np.array([4], np.int32)).tokens)
    made.extend(slots, *ragged([[3]]))
    assert (made._others.proposals.nodes[slots] == 0).all()


def test_what_fusion_is_told_they_are_told() -> None:
    class Keeping(Scripted):
        def refer(self, slots: Any, texts: Any, offsets: Any) -> None:
            self.calls.append(("refer", texts.tolist()))

        def end_reply(self, slots: Any) -> None:
            self.calls.append(("end_reply", len(slots)))

    other = Keeping()
    with registered(other=other):
        made = fusion({"other": {}})
    slots = made.open(*ragged([[1, 2], [3]]))
    made.refer(slots, *ragged([[4, 5], [6]]))
    made.draft(slots, np.array([4, 4], np.int32))
    made.end_reply(slots[1:])
    told = [call for call in other.calls if call[0] in ("refer", "end_reply")]
    assert told == [("refer", [4, 5, 6]), ("end_reply", 1)]


def test_a_rehearsal_is_one_for_them_too(tmp_path: Any) -> None:
    nested = {"capture": str(tmp_path / "captured")}
    options: dict[str, Any] = {
        "drafters": {"fusion": nested, "jacobi": {"initial": "fusion", "initial_settings": nested}}
    }
    with pytest.raises(ConfigError, match="capture: needs"):
        make_drafter("fusion", options)
    made = make_drafter("fusion", options, rehearsing=True)
    assert [type(other).__name__ for other in made._others._drafters] == ["Fusion", "Jacobi"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_draft_reaches_no_kernel(kind: str) -> None:
    with registered(bad=Malformed(MALFORMED[kind])):
        made = fusion({"bad": {}})
    slots = made.open(*ragged([[1, 2, 1]]))
    with pytest.raises(Exception):  # noqa: B017 - what a guard catches, of whatever kind
        made.draft(slots, np.array([4], np.int32))


@pytest.mark.parametrize("method", ["open", "extend"])
def test_a_drafter_that_fails_leaves_no_sequence_behind(method: str) -> None:
    class Failing(Scripted):
        failing = True

        def open(self, prompts: Any, offsets: Any) -> Any:
            if self.failing and method == "open":
                raise RuntimeError("on purpose")
            return super().open(prompts, offsets)

        def extend(self, slots: Any, tokens: Any, offsets: Any) -> None:
            if self.failing and method == "extend":
                raise RuntimeError("on purpose")
            super().extend(slots, tokens, offsets)

    first, failing = Scripted(), Failing()
    with registered(first=first, failing=failing):
        made = fusion({"first": {}, "failing": {}})
    with pytest.raises(RuntimeError):
        made.open(*ragged([[1, 2], [3]]))
    assert not first.texts
    failing.failing = False
    slots = made.open(*ragged([[1, 2], [3]]))
    assert sorted(slots.tolist()) == [0, 1]
    assert len(first.texts) == len(failing.texts) == 2


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


@pytest.mark.parametrize(("name", "last", "expected"), [("jacobi", 4, [20, 9, 9]), ("lookahead", 9, [9, 5, 20])])
def test_of_a_chain_that_was_cut_the_beginning_teaches(name: str, last: int, expected: list[int]) -> None:
    made = make_drafter(name, {"text": False} if name == "lookahead" else {})
    slots = made.open(*ragged([[9, 9]]))
    made.draft(slots, np.array([60], np.int32))
    made.adopt(slots, tree([(5, -1), (6, 0), (7, 1)]))
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 2]), np.array([4, 20], np.int32)))
    made.extend(slots, *ragged([[last]]))
    # The target's token behind 5, as the iterate, or as the end of an n-gram that begins with 9.
    assert made.draft(slots, np.array([60], np.int32)).tokens[:3].tolist() == expected


@pytest.mark.parametrize("name", ["jacobi", "lookahead"])
def test_of_a_tree_that_was_cut_nobody_knows_the_nodes(name: str) -> None:
    made = make_drafter(name, {"text": False} if name == "lookahead" else {})
    slots = made.open(*ragged([[9, 9]]))
    made.draft(slots, np.array([60], np.int32))
    made.adopt(slots, tree([(4, -1), (6, -1), (7, 0)]))
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 3]), np.array([4, 20, 21], np.int32)))
    made.extend(slots, *ragged([[4]]))
    # Guesses of the prompt's only token, and nothing of the target's.
    assert set(made.draft(slots, np.array([60], np.int32)).tokens.tolist()) == {9}


@pytest.mark.parametrize("name", ["jacobi", "lookahead"])
def test_no_draft_may_be_adopted(name: str) -> None:
    made = make_drafter(name, {})
    slots = made.open(*ragged([[9, 9]]))
    made.draft(slots, np.array([60], np.int32))
    made.adopt(slots, Drafts.empty(1))
    made.observe(slots, Feedback(np.zeros(1, np.int32), np.array([0, 1]), np.array([6], np.int32)))
    made.extend(slots, *ragged([[6]]))
    assert made.draft(slots, np.array([60], np.int32)).tokens[0] == 9


def test_mistakes_are_told() -> None:
    class Learning(Scripted):
        feedback = frozenset({"argmax"})

    with registered(cheat=Learning()), pytest.raises(ConfigError, match=r"own drafts alone$"):
        fusion({"cheat": {}})
    with pytest.raises(ConfigError, match="at most 4"):
        fusion({name: {} for name in ("jacobi", "lookahead", "prompt_lookup", "suffix_automaton", "fusion")})
    for drafters, message in (
        ({"token_recycling": {}}, "own drafts alone; use `recycling: true`"),
        ({"nothing": {}}, "unknown drafter"),
        ({"jacobi": {"no": 1}}, "no"),
    ):
        with pytest.raises(ConfigError, match=message):
            fusion(drafters)


def test_feedback_is_what_any_of_them_needs() -> None:
    assert fusion({}).feedback == frozenset()
    assert fusion({"prompt_lookup": {}}).feedback == frozenset()
    assert fusion({"jacobi": {}}, recycling=True).feedback == {"accepted", "argmax", "top_k"}

    class Wanting(Scripted):
        feedback = frozenset({"top_k"})
        feedback_top_k = 20

        def adopt(self, slots: Any, drafts: Drafts) -> None:
            pass

    with registered(wanting=Wanting()):
        assert Guard(fusion({"wanting": {}})).top_k == 20


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

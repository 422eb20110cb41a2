"""What the target ranks high, taken from vLLM's logits: for the right nodes of the right draft, or not at all."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from drafters import Scripted
from vllm_stand_in import Batch, with_drafter

from freedraft.integrations.vllm import proposer, tap
from freedraft.integrations.vllm.feedback import ranked_feedback
from freedraft.integrations.vllm.last_drafts import LastDrafts
from freedraft.integrations.vllm.statistics import Statistics
from freedraft.integrations.vllm.tap import LogitsTap, Ranked
from freedraft.plugins.base import Drafts

VOCABULARY = 50


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model runner whose `_sample` tells what it was given."""

    class Runner:
        def _sample(self, logits: Any, spec_decode_metadata: Any, more: int = 0) -> Any:
            return logits, spec_decode_metadata, more

    monkeypatch.setattr(tap, "_model_runner", lambda: Runner)
    return Runner


def logits_of(ranked: list[list[int]]) -> Any:
    """Logits that rank these tokens highest, in this order, a position a row."""
    logits = torch.zeros(len(ranked), VOCABULARY)
    for position, tokens in enumerate(ranked):
        for rank, token in enumerate(tokens):
            logits[position, token] = 10.0 - rank
    return logits


def drafted(*numbers: int) -> Any:
    return SimpleNamespace(num_draft_tokens=list(numbers))


class TestLogitsTap:
    def test_the_result_is_vllms_own_and_the_logits_are_left_alone(self, runner: Any) -> None:
        made = LogitsTap(2)
        logits = logits_of([[3, 4], [5, 6]])
        before = logits.clone()
        metadata = drafted(1)
        assert runner()._sample(logits, metadata) == (logits, metadata, 0)
        assert runner()._sample(logits, spec_decode_metadata=metadata, more=3)[2] == 3
        assert torch.equal(logits, before)
        made.remove()
        assert runner._sample.__name__ == "_sample"
        assert not hasattr(runner._sample, "__wrapped__")

    def test_positions_are_given_by_row(self, runner: Any) -> None:
        made = LogitsTap(2)
        runner()._sample(logits_of([[1, 2], [3, 4], [5, 6], [7, 8]]), drafted(2, 0))
        ranked = made.take(2)
        assert ranked is not None
        assert ranked.top_k.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
        assert ranked.top_k.dtype == np.int32
        assert ranked.offsets.tolist() == [0, 3, 4]
        runner()._sample(logits_of([[1, 2], [3, 4]]), None)
        ranked = made.take(2)
        assert ranked is not None
        assert ranked.offsets.tolist() == [0, 1, 2]

    def test_a_step_is_given_once_and_only_for_its_own_rows(self, runner: Any) -> None:
        made = LogitsTap(1)
        assert made.take(1) is None
        runner()._sample(logits_of([[1]]), None)
        assert made.take(2) is None
        runner()._sample(logits_of([[1]]), None)
        assert made.take(1) is not None
        assert made.take(1) is None

    @pytest.mark.parametrize(
        ("logits", "metadata"),
        [(None, None), (logits_of([[1]]), drafted(3)), (logits_of([[1]]), SimpleNamespace()), ("x", None)],
    )
    def test_what_is_not_understood_changes_nothing_but_the_count(
        self, runner: Any, logits: Any, metadata: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = LogitsTap(1)
        with caplog.at_level(logging.ERROR, "freedraft"):
            for _ in range(2):
                assert runner()._sample(logits, metadata) == (logits, metadata, 0)
        assert made.take(1) is None
        assert len(caplog.records) == min(1, made.errors)

    def test_vllms_own_errors_come_through(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Runner:
            def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
                raise ValueError("out of memory")

        monkeypatch.setattr(tap, "_model_runner", lambda: Runner)
        LogitsTap(1)
        with pytest.raises(ValueError, match="out of memory"):
            Runner()._sample(logits_of([[1]]), None)


def ranked(*rows: list[int]) -> Ranked:
    """The first-ranked token of each position of each row; the second is ten more."""
    flat = [token for row in rows for token in row]
    return Ranked(
        np.array([[token, token + 10] for token in flat], np.int32), np.cumsum([0, *map(len, rows)]).astype(np.int64)
    )


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


class TestFeedback:
    def told(self, last: LastDrafts, shown: Ranked, previous: Any, length: Any, new: Any, sequences: Any) -> Any:
        ready = np.ones(8, np.bool_)
        ready[7] = False
        who, feedback = ranked_feedback(
            frozenset({"argmax", "top_k"}),
            shown,
            last.notes,
            ready,
            sequences,
            previous,
            np.array(length, np.int32),
            new,
        )
        return who.tolist(), feedback

    def noted(self, sequences: Any = (), given: Any = (0,), asked: Any = (0,), nodes: Any = ()) -> LastDrafts:
        """Drafts of as many tokens as `nodes`; `given` and `asked` are offsets."""
        last = LastDrafts(8, 8, Statistics())
        size = given[-1]
        chains = Drafts(
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.ones(size, np.float32),
            np.zeros(size, np.uint8),
            ints(*given),
        )
        last.note(ints(*sequences), chains, ints(*asked), np.array(nodes, np.int32), ints(*given))
        return last

    def test_a_branch_of_a_tree_is_told_by_the_nodes_of_the_tree(self) -> None:
        # Of five nodes, 2 and 4 were given to vLLM.
        last = self.noted([3], [0, 2], [0, 5], [2, 4])
        who, feedback = self.told(last, ranked([1, 2, 3]), ints(10), [12], ints(2), ints(3))
        assert who == [3]
        assert feedback.accepted.tolist() == [1]
        assert feedback.offsets.tolist() == [0, 6]
        assert feedback.argmax.tolist() == [1, -1, -1, 2, -1, 3]
        assert feedback.top_k.tolist() == [[1, 11], [-1, -1], [-1, -1], [2, 12], [-1, -1], [3, 13]]

    def test_a_chain_of_which_less_was_verified_and_rows_without_a_draft(self) -> None:
        last = self.noted([0, 2], [0, 3, 5], [0, 3, 5], [0, 1, 2, 0, 1])
        shown = ranked([1, 2], [3], [4])
        who, feedback = self.told(last, shown, ints(5, 6, 7), [6, 7, 8], ints(1, 1, 1), ints(0, 1, 2))
        assert who == [0, 1, 2]
        assert feedback.accepted.tolist() == [0, 0, 0]
        assert feedback.offsets.tolist() == [0, 4, 5, 6]
        assert feedback.argmax.tolist() == [1, 2, -1, -1, 3, 4]

    def test_what_is_not_told(self) -> None:
        shown = ranked([1], [2], [3], [4], [5], [6, 7], [8])
        # In its prompt; missed a step; unknown; known; with a draft that nobody remembers; with text still to come.
        previous, length, new = ints(9, 4, 5, 6, 7, 8, 8), [9, 4, 8, 7, 8, 9, 9], ints(0, 0, 1, 1, 1, 1, 1)
        who, feedback = self.told(self.noted(), shown, previous, length, new, ints(0, 1, 2, -1, 4, 5, 7))
        assert who == [4]
        assert feedback.argmax.tolist() == [5]

    def test_a_draft_is_told_of_once(self) -> None:
        last = self.noted([0], [0, 2], [0, 2], [0, 1])
        last.note(ints(), Drafts.empty(0), ints(0), np.empty(0, np.int32), ints(0))
        who, _ = self.told(last, ranked([1, 2, 3]), ints(6), [7], ints(1), ints(0))
        assert who == []

    def test_nothing_is_told_of_a_prompt_that_is_taken_in_piecewise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The rankings are of the end of the text; the drafter is in the middle of it."""
        drafter = Scripted()
        monkeypatch.setattr(Scripted, "feedback", frozenset({"top_k"}))
        monkeypatch.setattr(proposer.Proposer, "_tap_for", lambda *_, **__: tap.MadeUpRankings(2))
        asked = with_drafter(monkeypatch, drafter, {"vllm": {"step_tokens": 4}})
        batch = Batch(list(range(9)))
        held = []
        for _ in range(6):
            batch.commit(asked, [5])
            held.append(sum(name == "observe" for name, _ in drafter.calls))
        # 10, 11 and 12 tokens at 4 a step: all there after the third, so that the fourth step is told of.
        assert held == [0, 0, 0, 1, 2, 3]


def test_the_drafter_is_told_before_its_text_grows(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def tree(self: Any, slots: Any, budget: Any) -> Drafts:
        return Drafts(
            np.array([8, 9, 7], np.int32),
            np.array([-1, -1, 1], np.int32),
            np.array([0.2, 0.6, 0.5], np.float32),
            np.zeros(3, np.uint8),
            np.array([0, 3]),
        )

    drafter = Scripted()
    drafter.feedback = frozenset({"top_k"})
    drafter.feedback_top_k = 2
    monkeypatch.setattr(type(drafter), "draft", tree)
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2])
    runner()._sample(logits_of([[4, 5]]), None)
    assert batch.commit(asked, [4]) == [[9, 7]]
    runner()._sample(logits_of([[9, 3], [7, 6], [2, 1]]), drafted(2))
    drafter.calls.clear()
    batch.commit(asked, [9, 7, 2])
    told = [details for method, details in drafter.calls if method == "observe"]
    assert len(told) == 1
    assert told[0].accepted.tolist() == [2]
    assert told[0].top_k.tolist() == [[9, 3], [-1, -1], [7, 6], [2, 1]]
    assert told[0].argmax is None
    assert [method for method, _ in drafter.calls][:2] == ["observe", "extend"]
    assert asked.statistics.errors == 0


@pytest.mark.parametrize(("feedback", "tapped"), [((), False), (("accepted",), False), (("top_k",), True)])
def test_a_drafter_that_needs_no_rankings_has_none_collected(
    runner: Any, monkeypatch: pytest.MonkeyPatch, feedback: tuple[str, ...], tapped: bool
) -> None:
    before = runner._sample
    drafter = Scripted(lambda text, budget: [9])
    drafter.feedback = frozenset(feedback)
    asked = with_drafter(monkeypatch, drafter)
    assert Batch([1]).commit(asked, [2]) == [[9]]
    assert (runner._sample is not before) == tapped

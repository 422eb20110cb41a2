"""Drafting for vLLM's batch, call by call: which text each row has, what is drafted, what a failure costs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from drafters import MALFORMED, Malformed, Raising, Scripted, chain
from vllm_stand_in import OUTSIDE, ROWS, WIDTH, Batch, vllm_config, with_drafter

from freedraft.integrations.vllm import Proposer
from freedraft.plugins.base import Drafts
from freedraft.plugins.branches import likeliest_chains


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)


def test_each_row_gets_the_draft_of_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [text[-1] + 1, len(text)]))
    batch = Batch([10, 11], [20], [30, 31, 32])
    assert batch.commit(asked, [1], [2], [3]) == [[2, 3], [3, 2], [4, 4]]
    assert batch.commit(asked, [5, 6], [7], [8]) == [[7, 5], [8, 3], [9, 5]]


def test_a_row_without_new_tokens_gets_no_draft_and_its_prompt_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: [7])
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2, 3], [4, 5, 6])
    assert batch.commit(asked, [], [8]) == [[], [7]]
    assert sorted(drafter.texts.values()) == [[1, 2, 3], [4, 5, 6, 8]]
    assert batch.commit(asked, [9], []) == [[7], []]


def test_the_default_drafter_drafts_what_repeats() -> None:
    assert Proposer(vllm_config()).pacing is not None
    asked = Proposer(vllm_config({"pacing": "off"}))
    text = list(range(100, 120))
    batch = Batch(text + text[:10])
    assert batch.commit(asked, [110]) == [[111, 112, 113, 114, 115]]


def test_no_draft_is_longer_than_asked_for_or_reaches_the_end_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[int] = []

    def greedy(text: list[int], budget: int) -> list[int]:
        budgets.append(budget)
        return [1] * budget

    asked = with_drafter(monkeypatch, Scripted(greedy))
    batch = Batch([3] * (WIDTH - 10))
    lengths = [len(batch.commit(asked, [4])[0]) for _ in range(10)]
    # 55 of 64 places are taken at first; a draft of n tokens is followed by one of the target's own.
    assert lengths == [5, 5, 5, 5, 4, 3, 2, 1, 0, 0]
    assert 0 not in budgets


def test_long_prompts_are_taken_in_over_steps_and_drafted_for_after(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: [len(text)])
    asked = with_drafter(monkeypatch, drafter, {"vllm": {"step_tokens": 20}})
    batch = Batch([5] * 49, [6] * 3)
    assert batch.commit(asked, [1], [1]) == [[], [4]]
    assert batch.commit(asked, [1], [1]) == [[], [5]]
    assert batch.commit(asked, [1], [1]) == [[52], [6]]
    sizes = [len(tokens) for method, tokens in drafter.calls if method == "extend"]
    assert max(sizes) <= 20
    assert sum(sizes) == 52 + 6


def test_a_request_that_ends_is_closed_and_one_that_moves_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: text[:2])
    asked = with_drafter(monkeypatch, drafter, {"vllm": {"idle_sequences": 0}})
    batch = Batch([1, 1], [2, 2], [3, 3])
    batch.commit(asked, [4], [4], [4])
    batch.texts = [batch.texts[2], batch.texts[1]]
    assert batch.commit(asked, [5], [5]) == [[3, 3], [2, 2]]
    assert drafter.closed == [[1, 1, 4]]
    assert sorted(drafter.texts.values()) == [[2, 2, 4, 5], [3, 3, 4, 5]]


@pytest.mark.parametrize("build", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_draft_is_no_draft(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Malformed(build))
    batch = Batch([1, 2])
    assert batch.commit(asked, [3]) == [[]]
    assert asked.statistics.errors == 1


def test_a_drafter_that_raises_costs_drafts_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Raising(Scripted(lambda text, budget: [len(text)]), 0.2, spared=("close",))
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1], [2], [3])
    with caplog.at_level(logging.ERROR, "freedraft"):
        answers = [batch.commit(asked, [4], [5], [6]) for _ in range(60)]
    for i, rows in enumerate(answers):
        assert all(draft in ([], [i + 2]) for draft in rows)
    assert sum(map(len, (draft for rows in answers for draft in rows))) > 30
    assert asked.statistics.errors == drafter.raised > 0
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_a_drafter_that_always_raises_is_asked_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Raising(Scripted(), 1.0)
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1])
    for _ in range(WIDTH - 2):
        assert batch.commit(asked, [4]) == [[]]
    assert 4 <= asked.statistics.errors <= 10


def in_a_pause(monkeypatch: pytest.MonkeyPatch) -> tuple[Scripted, Any, Batch]:
    """A drafter, its proposer, and a batch whose first row was lost twice; the second row is new."""
    drafter = Scripted(lambda text, budget: [len(text)])
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1])
    with monkeypatch.context() as failing:
        failing.setattr(drafter, "extend", None)
        for _ in range(2):
            batch.commit(asked, [4])
    batch.texts.append([2])
    return drafter, asked, batch


def test_a_failure_that_loses_nothing_prolongs_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, asked, batch = in_a_pause(monkeypatch)
    with monkeypatch.context() as failing:
        failing.setattr(drafter, "draft", None)
        batch.commit(asked, [4], [4])  # the second of the two steps for which the first row is left alone
    assert asked.statistics.errors == 3
    assert batch.commit(asked, [4], [4]) == [[5], [3]]


def test_a_failure_that_loses_more_does_prolong_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, asked, batch = in_a_pause(monkeypatch)
    with monkeypatch.context() as failing:
        failing.setattr(drafter, "extend", None)
        batch.commit(asked, [4], [4])
    for _ in range(3):
        assert batch.commit(asked, [4], [4]) == [[], []]
    assert batch.commit(asked, [4], [4]) == [[8], [6]]


def test_a_failure_of_our_own_is_survived(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    drafter = Scripted(lambda text, budget: [len(text)])
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2], [3])
    batch.commit(asked, [4], [4])
    with caplog.at_level(logging.ERROR, "freedraft"):
        assert asked.propose([[1]] * 2, "nonsense", batch.tokens) == [[], []]
        assert asked.propose([[1]] * (ROWS + 1), batch.length, batch.tokens) == [[]] * (ROWS + 1)
    assert len(caplog.records) == 1
    assert asked.statistics.errors == 2
    assert batch.commit(asked, [5], [5]) == [[], []]  # the pause after a second failure is two steps long
    assert batch.commit(asked, [5], [5]) == [[5], [4]]
    assert sorted(drafter.texts.values()) == [[1, 2, 4, 5, 5], [3, 4, 5, 5]]


def test_sequences_lost_to_the_drafter_are_closed_once_when_all_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: [len(text)])
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1], [2])
    with monkeypatch.context() as failing:
        failing.setattr(drafter, "extend", None)
        assert batch.commit(asked, [4], [4]) == [[], []]
    # Both rows end, and one that comes takes the place of the first in all tables.
    batch.texts = [[3]]
    assert batch.commit(asked, [4]) == [[2]]
    asked.propose([[1]], "nonsense", batch.tokens)
    batch.texts = [[5], [6]]
    for _ in range(2):
        batch.commit(asked, [4], [4])
    assert batch.commit(asked, [5], [5]) == [[4], [4]]
    assert asked.statistics.errors == 2


def test_a_failure_of_our_own_that_lasts_is_met_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Scripted())
    batch = Batch([1])
    for _ in range(60):
        assert asked.propose([[1]], "nonsense", batch.tokens) == [[]]
    assert 4 <= asked.statistics.errors <= 10


def test_replies_that_end_together_are_closed_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted()
    asked = with_drafter(monkeypatch, drafter, {"vllm": {"step_tokens": 20, "idle_sequences": 0}})
    batch = Batch([1] * 8, [2] * 8, [3] * 30, [4])
    for _ in range(4):
        batch.commit(asked, [5], [5], [5], [5])
    batch.texts, closed = [batch.texts[3]], []
    for _ in range(4):
        batch.commit(asked, [5])
        closed.append(len(drafter.closed))
    # 12, 12 and 34 tokens, a step until there are 20.
    assert closed == [2, 3, 3, 3]


class Conversing(Scripted):
    """Remembers how long the text was when a reply ended."""

    def end_reply(self, slots: Any) -> None:
        self.calls.append(("end_reply", [len(self.texts[slot]) for slot in slots.tolist()]))


def test_a_user_who_goes_on_ends_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Conversing(lambda text, budget: [len(text)])
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2], [3])
    batch.commit(asked, [4], [4])
    batch.commit(asked, [5, 6], [5])
    drafter.calls.clear()
    batch.texts[0] += [7, 8, 9]
    assert batch.commit(asked, [4], [6]) == [[9], [4]]
    assert [call for call in drafter.calls if call[0] in ("end_reply", "extend")] == [
        ("end_reply", [5]),
        ("extend", [7, 8, 9, 4, 6]),
    ]


def test_calls_that_vllm_leaves_out_end_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Conversing()
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2], [3], [4])
    batch.commit(asked, [4], [4], [])
    drafter.calls.clear()
    batch.texts[0] += [7, 8, 9]
    batch.texts[1] += [7]
    batch.commit(asked, [4], [6], [])
    assert all(name != "end_reply" for name, _ in drafter.calls)
    assert sorted(drafter.texts.values()) == [[1, 2, 4, 7, 8, 9, 4], [3, 4, 7, 6], [4]]


def test_calls_left_out_while_a_prompt_ends_end_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk of a prompt brings a token too, and as many as it should."""
    drafter = Conversing()
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2], [3], [4])
    batch.commit(asked, [4], [4], [])
    drafter.calls.clear()
    batch.texts[0] += [7, 8, 9]
    batch.texts[1] += [7]
    batch.commit(asked, [4], [6], [5])
    assert all(name != "end_reply" for name, _ in drafter.calls)


def test_two_users_who_go_on_at_once_end_both_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Conversing()
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2], [3], [9])
    batch.commit(asked, [4], [4], [5])
    first, second, third = batch.texts
    batch.texts = [third]
    batch.commit(asked, [5])
    drafter.calls.clear()
    batch.texts = [[*first, 7, 8], [*second, 7]]
    batch.commit(asked, [4], [4])
    assert [details for name, details in drafter.calls if name == "end_reply"] == [[3, 2]]


def test_ended_sequences_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted()
    asked = with_drafter(monkeypatch, drafter, {"vllm": {"step_tokens": 10, "idle_sequences": 0}})
    batch = Batch()
    for step in range(60):
        # As many tokens end in a step as may be taken in, and none fits beside another.
        batch.texts = [[step + 1] * 6, [step + 100] * 6][: 1 + step % 2]
        batch.commit(asked, *[[5]] * len(batch.texts))
    for _ in range(3):
        batch.texts = []
        batch.commit(asked)
    assert len(drafter.closed) >= 88
    assert asked._drafting is not None
    assert len(asked._drafting._ending) <= 2


def test_new_tokens_that_are_none_cost_a_draft_and_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Scripted())
    batch = Batch([1])
    assert asked.propose([None], batch.length, batch.tokens) == [[]]
    assert asked.statistics.errors == 1


def test_what_a_user_adds_is_no_source_for_others() -> None:
    asked = Proposer(vllm_config({"drafter": "fusion", "pacing": "off"}))
    reply, message = list(range(100, 112)), list(range(200, 212))
    batch = Batch([1, 2, 3])
    for token in reply:
        batch.commit(asked, [token])
    batch.texts[0] += message
    batch.commit(asked, [5])
    other = Batch([7])
    other.texts += [[8, *message[:4]], [9, *reply[:4]]]
    batch.texts = [batch.texts[0], *other.texts[1:]]
    drafts = batch.commit(asked, [6], [message[4]], [reply[4]])
    assert message[5] not in drafts[1]
    assert drafts[2] == reply[5:10]


def test_drafters_that_want_it_are_told_what_was_accepted_before_the_text_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafter = Scripted(lambda text, budget: [8, 8, 8])
    drafter.feedback = frozenset({"accepted"})
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1], [2], [3])
    batch.commit(asked, [4], [4], [])
    drafter.calls.clear()
    batch.commit(asked, [8, 8, 5], [6], [7])
    told = [details for method, details in drafter.calls if method == "observe"]
    assert [feedback.accepted.tolist() for feedback in told] == [[2, 0]]
    assert told[0].offsets.tolist() == [0, 4, 8]
    assert [method for method, _ in drafter.calls] == ["observe", "extend", "draft"]


def test_a_chain_passes_through_unchanged_and_a_tree_gives_its_likeliest_branch() -> None:
    tree = Drafts(
        np.array([10, 11, 12, 13, 14, 20, 21, 30], np.int32),
        np.array([-1, 0, -1, 2, 2, -1, 0, -1], np.int32),
        np.array([0.4, 0.39, 0.5, 0.1, 0.2, 0.9, 0.8, 0.3], np.float32),
        np.array([0, 0, 1, 0, 1, 2, 3, 4], np.uint8),
        np.array([0, 5, 5, 7, 8], np.int64),
    )
    chains, nodes = likeliest_chains(tree)
    assert nodes.tolist() == [2, 4, 0, 1, 0]
    assert chains.tokens.tolist() == [12, 14, 20, 21, 30]
    assert chains.parents.tolist() == [-1, 0, -1, 0, -1]
    assert chains.probability.tolist() == pytest.approx([0.5, 0.2, 0.9, 0.8, 0.3])
    assert chains.source.tolist() == [1, 1, 2, 3, 4]
    assert chains.offsets.tolist() == [0, 2, 2, 4, 5]
    straight = chain(list(range(40)))
    chains, nodes = likeliest_chains(straight)
    assert nodes.tolist() == list(range(40))
    assert chains.tokens.tolist() == list(range(40))
    assert chains.parents.tolist() == list(range(-1, 39))
    assert chains.offsets.tolist() == [0, 40]
    assert likeliest_chains(Drafts.empty(3))[0].rows == 3

"""Pacing in vLLM: which steps are timed and by how many tokens, what is cut, what is judged. The clock is made up."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from drafters import Scripted
from vllm_stand_in import OUTSIDE, Batch, vllm_config, with_drafter

from freedraft.integrations.vllm import Proposer
from freedraft.integrations.vllm import pacing as vllm_pacing
from freedraft.integrations.vllm.statistics import Statistics, describe
from freedraft.plugins.base import Drafts
from freedraft.plugins.pacing import Pacer
from freedraft.plugins.step_time import StepTime


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)


class Noting(Pacer):
    """Remembers what it is told, and keeps whole drafts."""

    def __init__(self) -> None:
        super().__init__()
        self.steps_told: list[tuple[int, float]] = []
        self.judged: list[tuple[list[float], list[int], list[int]]] = []
        self.sequences: list[int] = []

    def cut(self, drafts: Drafts, sequences: int) -> Drafts:
        self.sequences.append(sequences)
        return drafts

    def record(self, tokens: int, seconds: float) -> None:
        self.steps_told.append((tokens, seconds))

    def judge(self, probability: Any, offsets: Any, accepted: Any) -> None:
        self.judged.append((np.round(probability.astype(float), 3).tolist(), offsets.tolist(), accepted.tolist()))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> tuple[Proposer, Noting]:
    """A proposer that drafts two tokens a row, and its pacer; a second goes by from call to call."""
    drafter = Scripted(lambda text, budget: [text[-1] + 1, text[-1] + 2][:budget])
    asked = with_drafter(monkeypatch, drafter, {"pacing": "on"})
    noting = Noting()
    assert asked._drafting is not None
    ticks = iter(range(1000))
    asked._drafting._pacing = vllm_pacing.StepPacing(noting, clock=lambda: float(next(ticks)))
    return asked, noting


def test_steps_are_timed_by_what_they_verified(told: tuple[Proposer, Noting]) -> None:
    asked, noting = told
    batch = Batch([1], [1])
    batch.commit(asked, [2], [2])  # both are new: the step had their prompts in it
    assert noting.steps_told == []
    batch.commit(asked, [3, 4, 9], [7])  # verified two drafts of two tokens
    batch.commit(asked, [1], [1])
    assert noting.steps_told == [(6, 1.0), (6, 1.0)]
    assert noting.sequences == [2, 2, 2]


def test_a_step_with_a_message_of_the_users_in_it_is_not_timed(told: tuple[Proposer, Noting]) -> None:
    asked, noting = told
    batch = Batch([1], [1])
    batch.commit(asked, [2], [2])
    batch.texts[0] += [7, 8]
    batch.commit(asked, [3], [3])
    assert noting.steps_told == []
    batch.commit(asked, [3], [3])
    assert len(noting.steps_told) == 1


def test_steps_with_a_prompt_in_them_are_not_timed(told: tuple[Proposer, Noting]) -> None:
    asked, noting = told
    batch = Batch([1], [5, 5, 5, 5])
    batch.commit(asked, [2], [])
    batch.commit(asked, [3], [])  # the second is in the middle of its prompt
    assert noting.steps_told == []
    batch.commit(asked, [4], [6])
    batch.texts.append([8, 8])
    batch.commit(asked, [5], [7], [9])  # a third came
    before = len(noting.steps_told)
    batch.commit(asked, [6], [8], [1])
    assert len(noting.steps_told) == before + 1
    assert noting.steps_told[-1] == (9, 1.0)


def test_a_row_that_ended_verified_nothing(told: tuple[Proposer, Noting]) -> None:
    asked, noting = told
    batch = Batch([1], [50])
    batch.commit(asked, [2], [51])
    batch.texts.pop()
    batch.length[1] = 0
    batch.commit(asked, [3])
    assert noting.steps_told == [(3, 1.0)]


def test_outcomes_are_judged_by_row(told: tuple[Proposer, Noting]) -> None:
    asked, noting = told
    batch = Batch([1], [1])
    batch.commit(asked, [2], [2])
    batch.commit(asked, [3, 4, 9], [7])
    assert noting.judged == [([0.9, 0.81, 0.9, 0.81], [0, 2, 4], [2, 0])]


def test_what_does_not_pay_is_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: [1, 2, 3][:budget])
    asked = with_drafter(monkeypatch, drafter, {"pacing": {"explore": 1000}})
    assert asked._drafting is not None
    assert asked._drafting.pacer is not None
    asked._drafting.pacer.step_time = StepTime.known(lambda n: 1.0 + 5.0 * (n - 1))
    batch = Batch([4], [5])
    for token in (6, 7, 8):
        assert batch.commit(asked, [token], [token]) == [[], []]
    assert asked.statistics.withheld == 18
    assert asked.statistics.drafted.sum() == 0
    asked._drafting.pacer.step_time = StepTime.known(lambda n: 1.0)
    assert batch.commit(asked, [9], [9]) == [[1, 2, 3], [1, 2, 3]]
    assert asked.statistics.drafted.sum() == 6


def test_plain_steps_come_first_and_then_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with a clock of its own: T(n) is learnt, and what it says is done."""
    drafter = Scripted(lambda text, budget: [1, 2, 3][:budget])
    asked = with_drafter(monkeypatch, drafter, {"pacing": "on"})
    assert asked._drafting is not None
    pacer = asked._drafting.pacer
    assert pacer is not None
    now = [0.0]
    asked._drafting._pacing = vllm_pacing.StepPacing(pacer, clock=lambda: now[0])
    batch = Batch([4])
    lengths = []
    verified = 0
    for _ in range(20):
        now[0] += 0.01 + 0.0001 * verified
        verified = len(batch.commit(asked, [5])[0])
        lengths.append(verified)
    # The first step had the prompt in it; after three plain ones T(1) is known.
    assert lengths[:3] == [0, 0, 0]
    assert lengths[-1] == 3
    report = asked.pacing
    assert report is not None
    assert report["step_ms"][1] == pytest.approx(10, rel=0.05)
    assert report["calibration"][0]["observed"] == 0
    json.dumps(report)


def test_fusion_is_paced_by_default_and_can_be_left_alone() -> None:
    assert Proposer(vllm_config({"drafter": "fusion", "memory": "4MiB"})).pacing is not None
    assert Proposer(vllm_config({"drafter": "fusion", "memory": "4MiB", "pacing": "off"})).pacing is None
    assert Proposer(vllm_config({"drafter": "prompt_lookup", "memory": "4MiB"})).pacing is None


def test_a_failure_of_our_own_leaves_the_pacer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [1][:budget]), {"pacing": "on"})
    assert asked._drafting is not None
    pacer = asked._drafting.pacer
    assert asked.propose([[1]], "nonsense", np.zeros((1, 1), np.int32)) == [[]]
    assert asked._drafting._pacing is not None
    assert asked._drafting._pacing.pacer is pacer
    batch = Batch([4])
    batch.commit(asked, [5])
    assert asked.statistics.errors == 1


def test_the_line_of_statistics_tells_what_was_withheld() -> None:
    assert "Withheld" not in describe(Statistics(steps=1), Statistics())
    assert "Withheld: 7 tokens" in describe(Statistics(steps=1, withheld=9), Statistics(withheld=2))

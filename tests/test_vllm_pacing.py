"""Pacing in vLLM: which steps are timed and by how many tokens, what is cut, what is judged. The clock is made up."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from drafters import Scripted
from vllm_stand_in import LONGEST, OUTSIDE, WIDTH, Batch, metrics_written, vllm_config, with_drafter

from freedraft.integrations.vllm import Proposer, metrics, proposer
from freedraft.integrations.vllm import pacing as vllm_pacing
from freedraft.integrations.vllm.statistics import PeriodicLog, Statistics, describe, describe_pacing
from freedraft.integrations.vllm.tap import MadeUpRankings, Ranked
from freedraft.plugins.base import Drafts
from freedraft.plugins.calibration import NO_PARENTS
from freedraft.plugins.pacing import Pacer, PacingSettings
from freedraft.plugins.step_time import StepTime


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)


class Noting(Pacer):
    """Remembers what it is told, and keeps whole drafts."""

    def __init__(self, settings: PacingSettings | None = None) -> None:
        super().__init__(settings)
        self.steps_told: list[tuple[int, float]] = []
        self.judged: list[tuple[list[float], list[int], list[int]]] = []
        self.sequences: list[int] = []
        self.filled: list[int] = []

    def cut(self, drafts: Drafts, sequences: int, filled: int = 0) -> Drafts:
        self.sequences.append(sequences)
        self.filled.append(filled)
        return drafts

    def record(self, sequences: int, drafted: int, seconds: float, tree: bool = False) -> None:
        self.steps_told.append((sequences + drafted, seconds))

    def judge(self, probability: Any, offsets: Any, last: Any, parents: Any = NO_PARENTS) -> None:
        assert parents is NO_PARENTS
        self.judged.append((np.round(probability.astype(float), 3).tolist(), offsets.tolist(), last.tolist()))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> tuple[Proposer, Noting]:
    """A proposer that drafts two tokens a row, and its pacer; a second goes by from call to call."""
    drafter = Scripted(lambda text, budget: [text[-1] + 1, text[-1] + 2][:budget])
    asked = with_drafter(monkeypatch, drafter, {"pacing": "on"})
    noting = Noting()
    watch(asked, noting)
    return asked, noting


def watch(asked: Proposer, noting: Noting) -> None:
    """Let this pacer be told by a clock by which a second goes by from call to call."""
    assert asked._drafting is not None
    ticks = iter(range(1000))
    asked._drafting._pacing = vllm_pacing.StepPacing(noting, LONGEST, clock=lambda: float(next(ticks)))


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
    batch.commit(asked, [4], [6])  # the last chunk of its prompt
    assert noting.steps_told == []
    batch.texts.append([8, 8])
    batch.commit(asked, [5], [7], [9])  # a third came
    assert noting.steps_told == []
    batch.commit(asked, [6], [8], [1])
    assert noting.steps_told == [(9, 1.0)]


def test_a_step_that_computes_a_preempted_row_anew_is_not_timed(told: tuple[Proposer, Noting]) -> None:
    asked, noting = told
    batch = Batch([1], [50, 51])
    for _ in range(2):
        batch.commit(asked, [2], [52])
    assert len(noting.steps_told) == 1
    preempted = batch.texts.pop()
    batch.commit(asked, [3])
    assert len(noting.steps_told) == 2
    batch.texts.append(preempted)
    batch.commit(asked, [4], [53])
    assert asked.statistics.opened == 2  # it came back while it was known
    assert len(noting.steps_told) == 2
    batch.commit(asked, [5], [54])
    assert len(noting.steps_told) == 3


def test_a_step_is_timed_by_no_more_tokens_than_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [7, 8][:budget]), {"pacing": "on"})
    noting = Noting()
    watch(asked, noting)
    batch = Batch([1])
    for entries in (9, 9, 2, 3, 8):
        batch.commit(asked, [5], slot_mappings={"layer.0": np.zeros(entries), "layer.1": np.zeros(entries)})
    batch.commit(asked, [5], slot_mappings=[{"layer.0": np.zeros(1)}])
    # Three tokens each, but for one where a grammar, say, had cut the draft.
    assert [tokens for tokens, _ in noting.steps_told] == [3, 2, 3, 3, 3]


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
    assert noting.judged == [([0.9, 0.81, 0.9, 0.81], [0, 2, 4], [1, -1])]


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


UNIFORM = {"pacing": {"uniform": True}}


def uniform(monkeypatch: pytest.MonkeyPatch, propose: Any) -> tuple[Proposer, Noting, Scripted]:
    drafter = Scripted(propose)
    asked = with_drafter(monkeypatch, drafter, UNIFORM)
    noting = Noting(PacingSettings(uniform=True))
    watch(asked, noting)
    return asked, noting, drafter


def test_uniform_drafts_have_one_length_or_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, noting, drafter = uniform(monkeypatch, lambda text, budget: {1: [7, 8], 2: []}.get(text[0], []))
    batch = Batch([1], [2], [3, 3])
    assert batch.commit(asked, [4], [5], []) == [[7, 8, 4, 4, 4], [5, 5, 5, 5, 5], []]
    assert noting.filled == [2 * LONGEST]
    assert asked.statistics.drafted.sum() == 2
    # Of the first, the draft and two of the filling were right; of the second, one of the filling.
    answers = batch.commit(asked, [7, 8, 4, 4, 6], [5, 6], [9])
    assert answers == [[7, 8, 6, 6, 6], [6] * 5, [9] * 5]
    assert asked.statistics.accepted.sum() == 2
    assert noting.judged == [([0.9, 0.81], [0, 2], [1])]
    assert noting.steps_told == []
    batch.commit(asked, [1], [1], [1])
    assert noting.steps_told == [(3 * (1 + LONGEST), 1.0)]
    drafter.propose = lambda text, budget: []
    assert batch.commit(asked, [1], [1], [1]) == [[], [], []]
    batch.commit(asked, [1], [1], [1])
    assert [tokens for tokens, _ in noting.steps_told] == [18, 18, 3]


def test_a_row_whose_text_the_drafter_has_not_got_yet_is_filled_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: [7])
    asked = with_drafter(monkeypatch, drafter, {**UNIFORM, "vllm": {"step_tokens": 20}})
    watch(asked, Noting(PacingSettings(uniform=True)))
    assert Batch([5] * 49, [6] * 3).commit(asked, [1], [2]) == [[1] * 5, [7, 2, 2, 2, 2]]


def test_no_row_gets_a_draft_where_one_has_no_room_for_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, noting, _ = uniform(monkeypatch, lambda text, budget: [7, 8][:budget])
    batch = Batch([1], [3] * (WIDTH - LONGEST - 3))
    assert batch.commit(asked, [4], [4]) == [[7, 8, 4, 4, 4]] * 2
    assert batch.length[1] == WIDTH - LONGEST - 2
    assert batch.commit(asked, [4], [4]) == [[7, 8, 4, 4, 4]] * 2
    assert batch.commit(asked, [4], [4]) == [[], []]
    assert asked.statistics.withheld == 0
    batch.texts.pop()
    assert batch.commit(asked, [4]) == [[7, 8, 4, 4, 4]]
    # The plain step counts as one, and was timed as one.
    assert noting.filled == [10, 10, 10, 5]
    assert [tokens for tokens, _ in noting.steps_told] == [12, 12, 1]


def test_feedback_on_a_filled_draft_is_about_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: [7, 8])
    drafter.feedback = frozenset({"accepted", "argmax"})
    monkeypatch.setattr(proposer, "LogitsTap", MadeUpRankings)
    asked = with_drafter(monkeypatch, drafter, UNIFORM)
    watch(asked, Noting(PacingSettings(uniform=True)))
    shown = np.arange(100, 106, dtype=np.int32)[:, None]
    assert asked._drafting is not None
    monkeypatch.setattr(asked._drafting._tap, "take", lambda rows: Ranked(shown, np.array([0, 6])))
    batch = Batch([1])
    assert batch.commit(asked, [4]) == [[7, 8, 4, 4, 4]]
    batch.commit(asked, [7, 8, 4, 6])
    told = [details for method, details in drafter.calls if method == "observe"]
    assert [feedback.accepted.tolist() for feedback in told] == [[2]]
    assert told[0].argmax.tolist() == [100, 101, 102]


def test_plain_steps_come_first_and_then_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with a clock of its own: T(n) is learnt, and what it says is done."""
    drafter = Scripted(lambda text, budget: [1, 2, 3][:budget])
    asked = with_drafter(monkeypatch, drafter, {"pacing": "on"})
    assert asked._drafting is not None
    pacer = asked._drafting.pacer
    assert pacer is not None
    now = [0.0]
    asked._drafting._pacing = vllm_pacing.StepPacing(pacer, LONGEST, clock=lambda: now[0])
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


# What a user of vLLM sees


def seen(pacer: Pacer) -> Pacer:
    """A pacer after a few steps: T(n) is ten milliseconds and one more for each token, one of two drafts was right."""
    for _ in range(60):
        for drafted in range(8):
            pacer.record(1, drafted, 0.01 + 0.001 * drafted)
    two = Drafts(
        np.array([7, 8], np.int32), np.array([-1, 0], np.int32), np.array([0.9, 0.05], np.float32),
        np.zeros(2, np.uint8), np.array([0, 2]),
    )  # fmt: skip
    for _ in range(4):
        kept = pacer.cut(two, 1)
        pacer.judge(kept.probability, kept.offsets, np.array([0]))
    pacer.cut(Drafts(two.tokens, two.parents, two.probability / 90, two.source, two.offsets), 1)
    return pacer


def test_the_line_of_pacing_tells_what_was_decided_and_why() -> None:
    pacer = seen(Pacer())
    assert describe_pacing(pacer.report()) == (
        f"freedraft: Pacing: Gain: {pacer.gain:.2f}, Verified: 40.0% of what was drafted, in 4 of 5 steps "
        "(0 steps explored), T(1): 10.0 ms, T(3): 12.0 ms, T(5): 14.0 ms, T(6): 15.0 ms, T(8): 17.0 ms, "
        "Predicted/right: 0.90/1.00"
    )
    assert describe_pacing(Pacer().report()).endswith("T: not measured, Predicted/right: none judged")


def test_pacing_has_a_line_of_its_own_where_drafts_are_paced(caplog: pytest.LogCaptureFixture) -> None:
    for pacer, lines in ((None, 1), (Pacer(), 2)):
        caplog.clear()
        statistics = Statistics()
        log = PeriodicLog(statistics, 0, pacer)
        statistics.steps += 1
        with caplog.at_level(logging.INFO, "freedraft"):
            log.write()
            log.write()
        assert len(caplog.records) == lines
        assert ("Pacing: Gain" in caplog.text) == (lines == 2)


def test_the_proposer_writes_that_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Pacer | None] = []

    class Log:
        def __init__(self, statistics: Statistics, interval: float, pacer: Pacer | None) -> None:
            told.append(pacer)

        def end(self) -> None:
            pass

    monkeypatch.setattr(proposer, "PeriodicLog", Log)
    paced = with_drafter(monkeypatch, Scripted(), {"pacing": "on"})
    with_drafter(monkeypatch, Scripted())
    assert paced._drafting is not None
    assert paced._drafting.pacer is not None
    assert told == [paced._drafting.pacer, None]


def test_metrics_tell_the_gain_and_what_was_decided(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path / "metrics"))

    def scraped() -> dict[str, float]:
        return {
            sample.name + sample.labels.get("decision", ""): sample.value
            for metric in metrics.Collector().collect()
            for sample in metric.samples
        }

    with_drafter(monkeypatch, Scripted())
    assert "freedraft:pacing_gain" not in scraped()
    asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [7][:budget]), {"pacing": "on"})
    assert asked._drafting is not None
    assert scraped()["freedraft:pacing_gain"] == 1
    pacer = seen(asked._drafting.pacer or pytest.fail("no pacer"))
    assert len(Batch([1]).commit(asked, [2])[0]) == 1
    metrics_written(asked)
    values = scraped()
    assert values["freedraft:pacing_gain"] == pytest.approx(pacer.gain)
    assert pacer.gain > 1.1
    assert values["freedraft:paced_steps_totalverified"] == 5
    assert values["freedraft:paced_steps_totalplain"] == 1
    assert values["freedraft:paced_steps_totalexplored"] == 0
    asked._metrics.end()  # type: ignore[union-attr]
    assert scraped()["freedraft:pacing_gain"] == 0

"""Pacing in `generate`: what is timed and told, what is cut, who is paced. The text is never touched."""

from __future__ import annotations

import json
from typing import Any

import drafters
import pytest
import tiny
import torch

from freedraft.integrations.hf import Speculative
from freedraft.plugins.base import Drafts
from freedraft.plugins.calibration import NO_PARENTS
from freedraft.plugins.pacing import Pacer
from freedraft.plugins.step_time import StepTime

one_thread = tiny.one_thread
NEW = 40


class Noting(Pacer):
    """Remembers what it is told; keeps the first `keep` draft tokens, all by default."""

    def __init__(self, keep: int = 99) -> None:
        super().__init__()
        self.keep = keep
        self.cuts: list[int] = []
        self.recorded: list[int] = []
        self.seconds: list[float] = []
        self.judged: list[tuple[int, int]] = []

    def cut(self, drafts: Drafts, sequences: int, filled: int = 0, *, padded: bool = False) -> Drafts:
        assert sequences == 1
        assert padded
        self.cuts.append(len(drafts.tokens))
        return drafters.chain(drafts.tokens[: self.keep].tolist())

    def record(self, sequences: int, drafted: int, seconds: float, tree: bool = False) -> None:
        self.recorded.append(sequences + drafted)
        self.seconds.append(seconds)

    def judge(self, probability: Any, offsets: Any, last: Any, parents: Any = NO_PARENTS) -> None:
        assert offsets.tolist() == [0, len(probability)]
        assert len(last) == 1
        assert parents.tolist() == list(range(-1, len(probability) - 1))
        self.judged.append((len(probability), int(last[0]) + 1))


def generate(ours: Speculative, **options: Any) -> list[int]:
    ids = tiny.speculative(tiny.model(), tiny.prompt(), ours, max_new_tokens=NEW, do_sample=False, **options)
    return ids[0].tolist()


@pytest.fixture
def text() -> list[int]:
    return tiny.plain(tiny.model(), tiny.prompt(), max_new_tokens=NEW, do_sample=False)[0].tolist()


def noting(make: drafters.Scripted, keep: int = 99) -> tuple[Speculative, Noting]:
    ours = Speculative(make, pacing="on")
    ours._pacer = Noting(keep)
    return ours, ours._pacer


def test_every_step_but_the_prompt_is_timed_by_its_width(text: list[int]) -> None:
    ours, told = noting(drafters.truth(text))
    assert generate(ours, stopping_criteria=None) == text
    assert ours.statistics is not None
    assert len(told.recorded) == ours.statistics.forward_passes - 1
    assert sum(told.recorded) == ours.statistics.drafted + len(told.recorded)
    assert min(told.seconds) > 0
    assert sum(told.seconds) <= ours.statistics.total_seconds


def test_a_step_takes_drafting_and_verifying(text: list[int]) -> None:
    ours, told = noting(drafters.copying(ngram=1))
    assert generate(ours) == text
    assert ours.statistics is not None
    # The prompt's share of drafting is not in the steps.
    assert sum(told.seconds) > ours.statistics.verifying_seconds


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_what_is_cut_is_not_verified(text: list[int], keep: int) -> None:
    ours, told = noting(drafters.truth(text), keep)
    assert generate(ours) == text
    assert ours.statistics is not None
    assert max(told.recorded) == keep + 1
    assert ours.statistics.proposed == sum(told.cuts) > ours.statistics.drafted
    # Every draft was right: the steps are as many as that leaves.
    assert ours.statistics.forward_passes == 1 + -(-(NEW - 1) // (keep + 1))


def test_a_batch_is_timed_by_its_padded_size() -> None:
    """The first row drafts three tokens, the second one: the pass has four for each."""

    class Uneven(drafters.Scripted):
        def draft(self, slots: Any, budget: Any) -> Drafts:
            return drafters.chains([[3] * min(most, int(room)) for most, room in zip((3, 1), budget, strict=False)])

    class Told(Noting):
        def cut(self, drafts: Drafts, sequences: int, filled: int = 0, *, padded: bool = False) -> Drafts:
            assert padded
            assert sequences == drafts.rows
            return drafts

        def judge(self, *_: Any) -> None:
            pass

    ids = torch.cat([tiny.prompt(seed=0), tiny.prompt(seed=1)])
    expected = tiny.plain(tiny.model(), ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    ours = Speculative(Uneven(), pacing="on")
    ours._pacer = told = Told()
    replies = tiny.speculative(tiny.model(), ids, ours, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert replies.tolist() == expected.tolist()
    assert told.recorded[0] == 8


@pytest.mark.parametrize("part", ["cut", "record", "judge"])
def test_a_failure_of_pacing_fails_no_request(
    text: list[int], part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no more pacing")

    ours = Speculative(drafters.half_true(text, tiny.VOCABULARY), pacing="on")
    ours._pacer.step_time = StepTime.known(lambda n: 1.0)  # type: ignore[union-attr]
    monkeypatch.setattr(ours._pacer, part, fail)
    assert generate(ours) == text
    assert "pacing failed" in caplog.text
    assert ours.statistics is not None
    assert ours.statistics.accepted > 0


def test_outcomes_are_judged(text: list[int]) -> None:
    ours, told = noting(drafters.half_true(text, tiny.VOCABULARY))
    assert generate(ours) == text
    assert ours.statistics is not None
    # The last step is not, for the end of the text cuts it short.
    last = ours.statistics.accepted - sum(accepted for _, accepted in told.judged)
    assert 0 <= last <= 64
    assert len(told.judged) in (ours.statistics.drafts, ours.statistics.drafts - 1)
    assert all(accepted <= drafted for drafted, accepted in told.judged)
    assert any(accepted < drafted for drafted, accepted in told.judged)


class Branching(drafters.Scripted):
    """A token that is wrong, the right one, and behind it one more that is right and one that is wrong."""

    def __init__(self, text: list[int], wrong: int | None = None) -> None:
        super().__init__()
        self.text = text
        self.wrong = wrong

    def draft(self, slots: Any, budget: Any) -> Drafts:
        following = self.text[len(self.texts[int(slots[0])]) :][:2]
        if budget[0] < 4 or len(following) < 2:
            return Drafts.empty(1)
        first, second = following
        wrong, other = ((token + 1) % tiny.VOCABULARY for token in following)
        wrong = wrong if self.wrong is None else self.wrong
        return drafters.tree([(wrong, -1), (first, -1), (second, 1), (other, 1)])


def test_a_tree_is_timed_as_one_and_judged_node_by_node(text: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, bool]] = []
    ours = Speculative(Branching(text), pacing="on")
    pacer = ours._pacer
    assert pacer is not None
    monkeypatch.setattr(pacer, "record", lambda rows, drafted, _, tree: told.append((drafted, tree)))
    # Where time decided, only one node might be verified: a chain.
    pacer.step_time = StepTime.known(lambda n: 1.0)
    assert generate(ours, eos_token_id=None) == text
    assert set(told) == {(0, False), (4, True)}
    trees = told.count((4, True))
    tokens, right, predicted = pacer.calibration.sum(axis=0)
    # 0.9 and 0.8 at first, of which the second is right; behind it 0.7 right and 0.6 wrong.
    assert (tokens, right) == (4 * trees, 2 * trees)
    assert predicted == pytest.approx(3.0 * trees)


def test_a_tree_that_lost_nodes_to_a_token_that_ends_the_text_is_not_judged(text: list[int]) -> None:
    end = next(token for token in range(tiny.VOCABULARY) if token not in text)
    ours = Speculative(Branching(text, wrong=end), pacing="on")
    pacer = ours._pacer
    assert pacer is not None
    pacer.step_time = StepTime.known(lambda n: 1.0)
    assert generate(ours, eos_token_id=end) == text
    assert ours.statistics is not None
    assert ours.statistics.accepted > 0
    assert ours.statistics.drafted == 3 * ours.statistics.drafts
    assert not pacer.calibration.any()


def test_fusion_is_paced_by_default(text: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    record = Pacer.record
    ours = Speculative("fusion", memory="4MiB")
    monkeypatch.setattr(Pacer, "record", lambda *args: (told.append(args), record(*args)))
    assert generate(ours) == text
    report = ours.pacing
    assert report is not None
    assert json.loads(json.dumps(report))["step_ms"]
    assert ours.statistics is not None
    assert report["drafted"] == ours.statistics.proposed
    # One measurement a step and call goes on in the next.
    before = len(told)
    assert before == ours.statistics.forward_passes - 1
    time = ours._pacer.step_time  # type: ignore[union-attr]
    measured = time.plain_steps + time.draft_steps
    assert measured > before / 2
    assert generate(ours) == text
    assert len(told) == before + ours.statistics.forward_passes - 1
    assert time.plain_steps + time.draft_steps > measured


def test_others_are_paced_when_asked_to() -> None:
    assert Speculative("prompt_lookup", memory="4MiB").pacing is None
    assert Speculative("prompt_lookup", memory="4MiB", pacing="on").pacing is not None
    assert Speculative("prompt_lookup", memory="4MiB", pacing={"margin": 0.1}).pacing is not None
    assert Speculative(drafters.never()).pacing is None


@pytest.mark.parametrize("off", [False, "off", {"enabled": False}])
def test_off(text: list[int], off: Any) -> None:
    ours = Speculative("fusion", memory="4MiB", pacing=off)
    assert ours.pacing is None
    assert generate(ours) == text
    assert ours.statistics is not None
    # What ends the text is cut off a draft, nothing else.
    assert ours.statistics.drafted == ours.statistics.proposed


def test_keywords_override_a_configuration() -> None:
    config = {"drafter": "fusion", "memory": "4MiB", "pacing": {"margin": 0.5}}
    assert Speculative(config=config)._pacer.settings.margin == 0.5  # type: ignore[union-attr]
    assert Speculative(config=config, pacing={"margin": 0.1})._pacer.settings.margin == 0.1  # type: ignore[union-attr]
    assert Speculative(config=config, pacing="off").pacing is None


def test_sampling_draws_from_the_same_stream() -> None:
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7}
    expected = tiny.plain(tiny.model(), tiny.prompt(), 3, **options)
    state = torch.get_rng_state()
    ours = Speculative("fusion", memory="4MiB", min_probability=0)
    for _ in range(2):
        assert tiny.speculative(tiny.model(), tiny.prompt(), ours, 3, **options).tolist() == expected.tolist()
        assert torch.equal(torch.get_rng_state(), state)

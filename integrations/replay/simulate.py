"""Replay by teacher forcing: a drafter drafts for recorded replies, and what equals them counts as accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from freedraft.integrations.replay.costs import Cost
from freedraft.integrations.replay.recorded import Request
from freedraft.plugins.base import Drafter, Drafts, Feedback, Source
from freedraft.plugins.calibration import buckets, judge_nodes, nothing_judged
from freedraft.plugins.pacing import Pacer
from freedraft.plugins.step_time import StepTime
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.errors import UnsupportedError
from freedraft.retrieval.ragged import Float64, Int32, Int64, ragged

MATCH_LENGTHS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 2**31))


@dataclass(slots=True)
class Counts:
    """Sequence steps, draft tokens verified, and of them accepted."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Outcome:
    """What a replay came to.

    Attributes:
        tokens: reply tokens.
        steps: sequence steps: one sequence's share in a step of the batch.
        drafted, accepted: draft tokens verified, and of them accepted.
        requests, passes: requests begun; steps of the batch, which are forward passes.
        time, plain_time: of all steps, by the cost, with drafts and without any; drafting itself is in neither.
        drafting_seconds: measured, in all steps: drafting, pacing, and telling the drafter what was committed.
        opening_seconds: measured: giving the drafter the prompts.
        sources: by `Source` name.
        matches: by the length of the longest suffix of the sequence's own text that occurred in it before.
        calibration: of all that was drafted, verified or not; see the module of that name.
    """

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    requests: int = 0
    passes: int = 0
    time: float = 0.0
    plain_time: float = 0.0
    drafting_seconds: float = 0.0
    opening_seconds: float = 0.0
    sources: dict[str, Counts] = field(default_factory=dict)
    matches: dict[str, Counts] = field(default_factory=dict)
    calibration: Float64 = field(default_factory=nothing_judged)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens a sequence step; 1 is plain decoding."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the verified draft tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def drafted_per_step(self) -> float:
        """Mean draft tokens verified in a sequence step."""
        return self.drafted / self.steps if self.steps else 0.0

    @property
    def speedup(self) -> float:
        """Plain time over time."""
        return self.plain_time / self.time if self.time else 0.0

    @property
    def drafting_us_per_step(self) -> float:
        """Mean microseconds of drafting in a step of the batch."""
        return 1e6 * self.drafting_seconds / self.passes if self.passes else 0.0

    @property
    def opening_us_per_request(self) -> float:
        """Mean microseconds for which a prompt keeps the drafter busy."""
        return 1e6 * self.opening_seconds / self.requests if self.requests else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "tokens_per_step": round(self.tokens_per_step, 4),
            "acceptance": round(self.acceptance, 4),
            "drafted_per_step": round(self.drafted_per_step, 4),
            "speedup": round(self.speedup, 4),
            "passes": self.passes,
            "drafting_us_per_step": round(self.drafting_us_per_step, 2),
            "opening_us_per_request": round(self.opening_us_per_request, 2),
            "by_source": {name: _shown(counts) for name, counts in self.sources.items()},
            "by_match_length": {name: {"steps": c.steps, **_shown(c)} for name, c in self.matches.items()},
            "calibration": buckets(self.calibration),
        }


def _shown(counts: Counts) -> dict[str, int]:
    return {"drafted": counts.drafted, "accepted": counts.accepted}


def told_pacer(pacer: Pacer | None, cost: Cost) -> Pacer | None:
    """The pacer, told T(n) rather than measuring it."""
    if pacer is not None:
        pacer.step_time = StepTime.known(cost)
        pacer.settings = pacer.settings.model_copy(update={"explore": 2**31})
    return pacer


def replay(
    drafter: Drafter,
    requests: Sequence[Request],
    cost: Cost,
    *,
    pacer: Pacer | None = None,
    streams: int = 1,
    padded: bool = False,
    longest: int = 128,
) -> Outcome:
    """Run recorded requests through a drafter, `streams` at a time, each as soon as there is room for it.

    A step verifies what was drafted, or what the pacer leaves of it, and commits the accepted tokens with the one that
    follows. Chains and trees alike.

    Args:
        drafter: one that nothing has been drafted with, if earlier replies are not to help.
        requests: in order of arrival.
        cost: T(n).
        pacer: None verifies all that is drafted; see `told_pacer`.
        streams: sequences at a time, 1 or more.
        padded: a step takes as many tokens for every sequence as for the one with the longest draft.
        longest: tokens of a draft, at most.

    Raises:
        UnsupportedError: the drafter learns from the target's rankings, which recorded replies do not have.
    """
    missing = drafter.feedback - {"accepted"}
    if missing:
        raise UnsupportedError(
            f"{type(drafter).__name__} learns from the target's {' and '.join(sorted(missing))}, which recorded "
            "replies do not have; measure it with a model"
        )
    outcome = Outcome(
        sources={source.name.lower(): Counts() for source in Source},
        matches={_match_name(low, high): Counts() for low, high in MATCH_LENGTHS},
    )
    waiting = list(reversed(requests))
    running: list[_Running] = []
    texts = SuffixAutomata(memory=2**30)
    while waiting or running:
        while waiting and len(running) < streams:
            request = waiting.pop()
            prompt, offsets = ragged([request.prompt])
            started = perf_counter()
            slot = int(drafter.open(prompt, offsets)[0])
            outcome.opening_seconds += perf_counter() - started
            outcome.requests += 1
            running.append(_Running(request.reply, slot, int(texts.open(prompt, offsets)[0])))
        _step(drafter, pacer, cost, running, texts, outcome, padded, longest)
        ended = [one for one in running if one.place == len(one.reply)]
        if ended:
            drafter.close(np.array([one.slot for one in ended]))
            texts.close(np.array([one.text for one in ended]))
            running = [one for one in running if one.place < len(one.reply)]
    outcome.plain_time = plain_time([len(request.reply) for request in requests], cost, streams)
    return outcome


def plain_time(lengths: Sequence[int], cost: Cost, streams: int) -> float:
    """The time of plain decoding: replies of `lengths` tokens, `streams` at a time."""
    waiting = [length for length in reversed(lengths) if length]
    running: list[int] = []
    time = 0.0
    while waiting or running:
        while waiting and len(running) < streams:
            running.append(waiting.pop())
        steps = min(running)
        time += steps * cost(len(running))
        running = [left - steps for left in running if left > steps]
    return time


@dataclass(slots=True)
class _Running:
    reply: Int32
    slot: int
    text: int
    place: int = 0


def _step(
    drafter: Drafter,
    pacer: Pacer | None,
    cost: Cost,
    running: list[_Running],
    texts: SuffixAutomata,
    outcome: Outcome,
    padded: bool,
    longest: int,
) -> None:
    slots = np.array([one.slot for one in running])
    own = np.array([one.text for one in running])
    # The last token of a reply needs no draft after it.
    budget = np.array([min(longest, len(one.reply) - one.place - 1) for one in running], np.int32)
    started = perf_counter()
    whole = drafter.draft(slots, budget)
    drafts = whole if pacer is None else pacer.cut(whole, len(running), padded=padded)
    outcome.drafting_seconds += perf_counter() - started
    right = np.array([_last(_path(whole, i, one)) for i, one in enumerate(running)])
    judge_nodes(whole.probability, whole.offsets, right, whole.parents, outcome.calibration)
    matches = texts.match_lengths(own).tolist()
    accepted = np.zeros(len(running), np.int32)
    last = np.full(len(running), -1, np.int64)
    committed = []
    for i, one in enumerate(running):
        path = _path(drafts, i, one)
        row = drafts.row(i)
        _count(outcome, drafts, row, path, matches[i])
        accepted[i] = len(path)
        last[i] = _last(path)
        committed.append(one.reply[one.place : one.place + len(path) + 1])
        one.place += len(path) + 1
    if pacer is not None:
        pacer.judge(drafts.probability, drafts.offsets, last, drafts.parents)
    outcome.time += cost(_pass_tokens(drafts, padded))
    outcome.passes += 1
    tokens, offsets = ragged(committed)
    started = perf_counter()
    if drafter.feedback:
        drafter.observe(slots, Feedback(accepted, drafts.offsets + np.arange(len(drafts.offsets))))
    drafter.extend(slots, tokens, offsets)
    outcome.drafting_seconds += perf_counter() - started
    texts.extend(own, tokens, offsets)
    outcome.tokens += len(tokens)


def _pass_tokens(drafts: Drafts, padded: bool) -> int:
    """Tokens of the forward pass that verifies the drafts of all its sequences."""
    if padded:
        return drafts.rows * (1 + int(np.diff(drafts.offsets).max()))
    return drafts.rows + len(drafts.tokens)


def _path(drafts: Drafts, i: int, one: _Running) -> list[int]:
    """The nodes of row i, within it, that equal what follows in the reply."""
    row = drafts.row(i)
    tokens, parents = drafts.tokens[row].tolist(), drafts.parents[row].tolist()
    path: list[int] = []
    last, place = -1, one.place
    # Nodes come after their parents, so one pass finds the path.
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == last and place < len(one.reply) and token == one.reply[place]:
            path.append(node)
            last, place = node, place + 1
    return path


def _last(path: list[int]) -> int:
    return path[-1] if path else -1


def _count(outcome: Outcome, drafts: Drafts, row: slice, path: list[int], match: int) -> None:
    length = row.stop - row.start
    outcome.steps += 1
    outcome.drafted += length
    outcome.accepted += len(path)
    name = next(_match_name(low, high) for low, high in MATCH_LENGTHS if low <= match <= high)
    outcome.matches[name].steps += 1
    outcome.matches[name].drafted += length
    outcome.matches[name].accepted += len(path)
    sources: Int64 = drafts.source[row].astype(np.int64)
    for source in np.unique(sources).tolist():
        counts = outcome.sources.setdefault(Source(source).name.lower() if source < len(Source) else "other", Counts())
        counts.drafted += int((sources == source).sum())
        counts.accepted += int((sources[path] == source).sum()) if path else 0


def _match_name(low: int, high: int) -> str:
    if low == high:
        return str(low)
    return f"{low}-{high}" if high < 2**31 else f"{low}+"

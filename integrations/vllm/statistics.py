"""The periodic lines of statistics in vLLM's log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from freedraft.integrations.vllm.periodic import Periodic
from freedraft.plugins.base import Source
from freedraft.retrieval.ragged import Int64

if TYPE_CHECKING:
    # As in `metrics`, which loads this one.
    from freedraft.plugins.pacing import Pacer

logger = logging.getLogger("freedraft")

SOURCES = 256

TIMES_SHOWN = 5


@dataclass(slots=True)
class Statistics:
    """Totals since the start, the number of sequences excepted.

    A sequence step is one sequence's share in an engine step, when it got new tokens.

    Attributes:
        sequences: rows of the last step.
        steps: engine steps.
        sequence_steps: sequence steps; `tokens / sequence_steps` is the mean over all, with a draft or without.
        tokens: tokens that these committed.
        taken: tokens handed to the drafter, prompts included.
        opened: sequences begun, those built anew included.
        drafted: int64 `(256,)`, tokens drafted by source.
        accepted: int64 `(256,)`, of these accepted.
        seconds: spent in drafting.
        errors: failures, the drafter's and our own; each cost some drafts.
        withheld: tokens that were drafted, and not verified, for pacing saw that it would not pay.
    """

    sequences: int = 0
    steps: int = 0
    sequence_steps: int = 0
    tokens: int = 0
    taken: int = 0
    opened: int = 0
    drafted: Int64 = field(default_factory=lambda: np.zeros(SOURCES, np.int64))
    accepted: Int64 = field(default_factory=lambda: np.zeros(SOURCES, np.int64))
    seconds: float = 0.0
    errors: int = 0
    withheld: int = 0

    def copy(self) -> Statistics:
        """The same numbers, to compare with later."""
        return replace(self, drafted=self.drafted.copy(), accepted=self.accepted.copy())


def describe(now: Statistics, before: Statistics) -> str:
    """What happened between the two, in a line."""
    steps = now.steps - before.steps
    sequence_steps = now.sequence_steps - before.sequence_steps
    drafted = int((now.drafted - before.drafted).sum())
    accepted = int((now.accepted - before.accepted).sum())
    tokens_a_step = _quotient(now.tokens - before.tokens, sequence_steps, ".2f")
    acceptance = _quotient(accepted, drafted, ".1%")
    microseconds = _quotient(1e6 * (now.seconds - before.seconds), steps, ".0f")
    withheld = now.withheld - before.withheld
    paced = f", Withheld: {withheld} tokens" if now.withheld else ""
    return (
        f"freedraft: Sequences: {now.sequences}, Tokens per step: {tokens_a_step}, "
        f"Drafted: {drafted} tokens, Accepted: {accepted} tokens ({acceptance}){paced}, "
        f"Drafting: {microseconds} us per engine step, Errors: {now.errors}"
    )


def describe_pacing(report: Mapping[str, Any]) -> str:
    """What `Pacer.report` tells, all since the start, in a line."""
    share = _quotient(report["kept"], report["drafted"], ".1%")
    measured = sorted(report["step_ms"].items())
    last = len(measured) - 1
    shown = sorted({round(last * i / (TIMES_SHOWN - 1)) for i in range(TIMES_SHOWN)}) if measured else []
    times = ", ".join(f"T({tokens}): {ms:.1f} ms" for tokens, ms in (measured[i] for i in shown))
    right = ", ".join(f"{row['predicted']:.2f}/{row['observed']:.2f}" for row in report["calibration"])
    return (
        f"freedraft: Pacing: Gain: {report['gain']:.2f}, Verified: {share} of what was drafted, in "
        f"{report['verified']} of {report['steps']} steps ({report['explored']} steps explored), "
        f"{times or 'T: not measured'}, Predicted/right: {right or 'none judged'}"
    )


def _quotient(part: float, whole: float, form: str) -> str:
    """`part / whole` in this form; a dash where there is nothing to divide by."""
    return format(part / whole, form) if whole else "-"


def source_name(source: int) -> str:
    """The label of a `Source`."""
    try:
        return Source(source).name.lower()
    except ValueError:
        return str(source)


class PeriodicLog:
    """Writes `describe` at an interval as long as something happens, from a thread of its own; `describe_pacing` too.

    The thread only reads numbers, so that the last of them are written, too, when no request comes any more.

    Args:
        statistics: of the proposer.
        interval: seconds; 0 = never.
        pacer: None where drafts are not paced.
    """

    def __init__(self, statistics: Statistics, interval: float, pacer: Pacer | None = None) -> None:
        self._statistics = statistics
        self._pacer = pacer
        self._last = statistics.copy()
        self._writing = Periodic(interval, self._write, "freedraft-statistics")

    def write(self) -> None:
        """Write the lines, if there was a step since the last."""
        self._writing.now()

    def end(self) -> None:
        """Stop the thread."""
        self._writing.end()

    def _write(self) -> None:
        now = self._statistics.copy()
        if now.steps != self._last.steps:
            logger.info(describe(now, self._last))
            if self._pacer is not None:
                logger.info(describe_pacing(self._pacer.report()))
            self._last = now

"""One step of drafting for a batch: find the sequences, catch up, draft. Knows vLLM's arrays, but not vLLM."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freedraft.integrations.guard import Guard
from freedraft.integrations.vllm.chains import likeliest_chains
from freedraft.integrations.vllm.feedback import Asked
from freedraft.integrations.vllm.ledger import Ledger, Verified
from freedraft.integrations.vllm.pacing import StepPacing
from freedraft.integrations.vllm.settings import VllmSettings
from freedraft.integrations.vllm.statistics import Statistics
from freedraft.integrations.vllm.tap import RankingSource
from freedraft.integrations.vllm.tracker import SequenceTracker, Step
from freedraft.plugins.base import Drafter, Feedback
from freedraft.plugins.pacing import Pacer
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

logger = logging.getLogger("freedraft")

NO_TOKENS = np.empty(0, np.int32)
LONGEST_WAIT = 256


class BatchDrafting:
    """Drafts for the rows of vLLM's batch; never raises.

    A drafter's failure costs the sequences of that call their state. They are built anew after a pause, which doubles
    with each failure up to 256 steps and is forgotten after as many without one.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        rows: int,
        longest: int,
        width: int,
        vocabulary: int,
        settings: VllmSettings,
        pacer: Pacer | None = None,
        tap: RankingSource | None = None,
    ) -> None:
        """Prepare.

        Args:
            drafter: the drafter.
            rows: the most rows of a batch.
            longest: tokens of a draft, at most.
            width: tokens of a sequence, at most.
            vocabulary: token ids are below this.
            settings: bounds.
            pacer: cuts drafts to what pays; None leaves them whole.
            tap: where the target's rankings come from; None for a drafter that asks for none.
        """
        self.statistics = Statistics()
        self.guard = Guard(drafter)
        self._rows = rows
        self._longest = longest
        self._width = width
        self._vocabulary = vocabulary
        self._settings = settings
        self._pacer = pacer
        self._tap = tap
        self._pacing: StepPacing | None = None
        self._own_errors = 0
        self._wait = 1
        self._failed_at = 0
        self._retry_at = 0
        self._begin()

    def _begin(self) -> None:
        bounds = self._settings
        self._tracker = SequenceTracker(
            self._rows,
            step_tokens=bounds.step_tokens,
            idle_sequences=bounds.idle_sequences,
            idle_tokens=bounds.idle_tokens,
            idle_steps=bounds.idle_steps,
        )
        self._slots = np.full(self._tracker.capacity, -1, np.int64)
        self._ledger = Ledger(self._tracker.capacity, self._longest, self.statistics)
        self._asked = Asked(self._tracker.capacity, self._longest)
        if self._pacer is not None:
            self._pacing = StepPacing(self._pacer, self._tracker.capacity, self._longest)

    @property
    def pacing(self) -> dict[str, Any] | None:
        """What the pacer reports; None where there is none."""
        return None if self._pacer is None else self._pacer.report()

    def propose(self, sampled: Sequence[Sequence[int]], length: Int32, tokens: Int32) -> list[list[int]]:
        """Draft for each row.

        Args:
            sampled: each row's new tokens; none means that the row gets no draft.
            length: int32 `(rows or more,)`, tokens of each row, the new ones included.
            tokens: int32 `(rows or more, width)`, the rows.

        Returns:
            A list a row, of 0 to `longest` tokens.
        """
        try:
            drafts = self._propose(sampled, length, tokens)
        except Exception:
            if not self._own_errors:
                logger.exception("freedraft: a step of drafting failed; decoding goes on without (logged once)")
            self._own_errors += 1
            self._abandon()
            drafts = [[] for _ in sampled]
        self.statistics.errors = self.guard.errors + self._own_errors + (self._tap.errors if self._tap else 0)
        return drafts

    def _propose(self, sampled: Sequence[Sequence[int]], length: Int32, tokens: Int32) -> list[list[int]]:
        rows = len(sampled)
        new = np.fromiter(map(len, sampled), np.int64, rows)
        self._reopen_when_due()
        step = self._tracker.step(length, new, tokens)
        errors = self.guard.errors
        if len(step.closed):
            self.guard.close(self._slots[step.closed])
            self._slots[step.closed] = -1
        if len(step.opened):
            self._slots[step.opened] = self.guard.open(NO_TOKENS, np.zeros(len(step.opened) + 1, np.int64))
        verified = self._ledger.settle(step.sequences, step.previous, length, new)
        decoding = int(np.count_nonzero(new))
        if self._pacing is not None:
            self._pacing.stepped(decoding, decoding == rows and not len(step.opened), verified)
        self._observe(step, length, new, verified)
        if len(step.growing):
            self.guard.extend(self._slots[step.growing], step.tokens, step.offsets)

        answer: list[list[int]] = [[] for _ in range(rows)]
        drafting, sequences, room = _who_drafts(step.sequences, step.ready, new, length, self._width, self._longest)
        if len(drafting):
            if self._pacing is not None:
                self._pacing.floor(self.guard.drafter, decoding, int(room.sum()))
            asked = self.guard.draft(self._slots[sequences], room, self._vocabulary)
            drafts, nodes = likeliest_chains(asked)
            if self._tap is not None:
                self._asked.note(sequences, asked.offsets, nodes, drafts.offsets)
            if self._pacing is not None:
                proposed = len(drafts.tokens)
                drafts = self._pacing.cut(drafts, sequences, decoding)
                self.statistics.withheld += proposed - len(drafts.tokens)
            self._ledger.note(sequences, drafts.source, drafts.offsets)
            flat, ends = drafts.tokens.tolist(), drafts.offsets.tolist()
            for j, row in enumerate(drafting.tolist()):
                answer[row] = flat[ends[j] : ends[j + 1]]

        if self.guard.errors != errors:
            self._pause()
        counts = self.statistics
        counts.steps += 1
        counts.sequences = rows
        counts.sequence_steps += sum(map(bool, sampled))
        counts.tokens += sum(map(len, sampled))
        counts.taken += len(step.tokens)
        counts.opened += len(step.opened)
        return answer

    def _observe(self, step: Step, length: Int32, new: Int64, verified: Verified) -> None:
        """Tell the drafter what it asked for of the step that ended just now."""
        if self._tap is not None:
            ranked = self._tap.take(len(new))
            if ranked is None:
                return
            sequences, feedback = self._asked.feedback(
                self.guard.feedback, ranked, step.sequences, step.previous, length, new
            )
            if len(sequences):
                self.guard.observe(self._slots[sequences], feedback)
        elif self.guard.feedback and len(verified.sequences):
            offsets = np.concatenate(([0], np.cumsum(1 + verified.drafted)))
            self.guard.observe(self._slots[verified.sequences], Feedback(verified.accepted, offsets))

    def _pause(self) -> None:
        now = self.statistics.steps
        if now - self._failed_at > LONGEST_WAIT:
            self._wait = 1
        self._failed_at = now
        self._retry_at = now + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _reopen_when_due(self) -> None:
        if not self._retry_at or self.statistics.steps < self._retry_at:
            return
        self._retry_at = 0
        known = self._tracker.known
        lost = known[self.guard.retired(self._slots[known])]
        self.guard.close(self._slots[lost])
        self._tracker.forget(lost)

    def _abandon(self) -> None:
        """After a failure of our own nothing is known for sure: begin anew."""
        known = self._tracker.known
        slots = self._slots[known]
        self._begin()
        self.guard.close(slots[slots >= 0])


@kernel
def _who_drafts(
    sequences: Int64, ready: NDArray[np.bool_], new: Int64, length: Int32, width: int, longest: int
) -> tuple[Int64, Int64, Int32]:
    """The rows that get a draft, their sequences, and how long it may be: int64, int64 and int32 `(n,)`.

    A draft of n tokens is followed by a token of the target's own, so one place must stay free.
    """
    rows = sequences.shape[0]
    drafting = np.empty(rows, np.int64)
    room = np.empty(rows, np.int32)
    count = 0
    for i in range(rows):
        most = min(width - 1 - length[i], longest)
        if ready[i] and new[i] > 0 and most > 0:
            drafting[count] = i
            room[count] = most
            count += 1
    drafting = drafting[:count]
    return drafting, sequences[drafting], room[:count]

"""One step of drafting for a batch: find the sequences, catch up, draft. Knows vLLM's arrays, but not vLLM."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freedraft.integrations.guard import Guard
from freedraft.integrations.vllm.feedback import ranked_feedback
from freedraft.integrations.vllm.last_drafts import LastDrafts, Verified
from freedraft.integrations.vllm.pacing import StepPacing
from freedraft.integrations.vllm.settings import VllmSettings
from freedraft.integrations.vllm.statistics import Statistics
from freedraft.integrations.vllm.tap import RankingSource
from freedraft.integrations.vllm.tracker import SequenceTracker, Step
from freedraft.plugins.base import Drafter, Drafts, Feedback
from freedraft.plugins.branches import likeliest_chains
from freedraft.plugins.pacing import Pacer
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

logger = logging.getLogger("freedraft")

NO_TOKENS = np.empty(0, np.int32)
LONGEST_WAIT = 256
NEVER = 2**62


class BatchDrafting:
    """Drafts for the rows of vLLM's batch; never raises.

    A failure of the drafter's `open` or `extend` costs the sequences of that call their state, one of our own all
    sequences. They are built anew after a pause, which doubles with each failure up to 256 steps and is forgotten after
    as many without one.
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
        self.pacer = pacer
        self._tap = tap
        self._pacing: StepPacing | None = None
        self._own_errors = 0
        self._wait = 1
        self._failed_at = 0
        self._retry_at = 0
        self._idle_until = 0
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
        sequences = self._tracker.capacity
        self._slots = np.full(sequences, -1, np.int64)
        self._held = np.zeros(sequences, np.int64)
        self._ready = np.zeros(sequences, np.bool_)
        self._lost = np.zeros(sequences, np.bool_)
        self._grew = np.zeros(sequences, np.int64)
        self._ending: deque[tuple[int, int]] = deque()
        self._last = LastDrafts(sequences, self._longest, self.statistics)
        if self.pacer is not None:
            self._pacing = StepPacing(self.pacer, self._longest)

    @property
    def pacing(self) -> dict[str, Any] | None:
        """What the pacer reports; None where there is none."""
        return None if self.pacer is None else self.pacer.report()

    def propose(
        self, sampled: Sequence[Sequence[int]], length: Int32, tokens: Int32, most: int | None = None
    ) -> list[list[int]]:
        """Draft for each row.

        Args:
            sampled: each row's new tokens; none means that the row gets no draft.
            length: int32 `(rows or more,)`, tokens of each row, the new ones included.
            tokens: int32 `(rows or more, width)`, the rows.
            most: no more tokens than this were in the step's forward pass; None where that is not known.

        Returns:
            A list a row, of 0 to `longest` tokens.
        """
        rows = len(sampled)
        counts = self.statistics
        try:
            lengths = [len(row) for row in sampled]
        except Exception:
            self._begin_anew()
            counts.errors = self._errors
            return [[] for _ in range(rows)]
        counts.steps += 1
        counts.sequences = rows
        decoding = rows - lengths.count(0)
        counts.sequence_steps += decoding
        counts.tokens += sum(lengths)
        drafts: list[list[int]] = [[] for _ in range(rows)]
        if counts.steps >= self._idle_until:
            try:
                self._propose(np.array(lengths, np.int64), decoding, length, tokens, most, drafts)
            except Exception:
                self._begin_anew()
                drafts = [[] for _ in range(rows)]
        counts.errors = self._errors
        return drafts

    @property
    def _errors(self) -> int:
        return self.guard.errors + self._own_errors + (self._tap.errors if self._tap else 0)

    def _propose(
        self, new: Int64, decoding: int, length: Int32, tokens: Int32, most: int | None, answer: list[list[int]]
    ) -> None:
        self._reopen_when_due()
        step = self._tracker.step(length, new, tokens)
        errors = self.guard.errors
        self._open_and_close(step)
        steady, continued = _how_rows_grew(
            step.sequences, step.previous, length, new, self._grew, self.statistics.steps
        )
        if len(continued):
            # The user's next message; of a row that is alone, also what came in calls that vLLM left out.
            self.guard.end_reply(self._slots[continued])
        verified = self._last.settle(step.sequences, step.previous, length, new)
        if self._pacing is not None:
            self._pacing.stepped(decoding, steady, verified, most)
        self._observe(step, length, new, verified)
        if len(step.growing):
            self.guard.extend(self._slots[step.growing], step.tokens, step.offsets)
            self._held[step.growing] += step.offsets[1:] - step.offsets[:-1]
        self.statistics.taken += len(step.tokens)

        uniform = self._pacing is not None and self._pacing.uniform
        drafting, sequences, room = _who_drafts(
            step.sequences, step.ready, new, length, self._width, self._longest, uniform
        )
        if self._tap is not None:
            self._ready[:] = False
            self._ready[step.sequences[step.ready]] = True
        drafts = self._draft(sequences, room, decoding)
        flat, ends = drafts.tokens.tolist(), drafts.offsets.tolist()
        for j, row in enumerate(drafting.tolist()):
            answer[row] = flat[ends[j] : ends[j + 1]]
        if self._pacing is not None and self._pacing.filled:
            _fill(answer, new, length, tokens, self._longest)
        if self.guard.errors != errors:
            self._pause_if_lost(step.sequences[step.sequences >= 0])

    def _draft(self, sequences: Int64, room: Int32, decoding: int) -> Drafts:
        """Chains for these sequences, in a batch of `decoding` rows, and note them."""
        asked = drafts = Drafts.empty(len(sequences))
        nodes, chains = NO_TOKENS, drafts
        if len(sequences):
            if self._pacing is not None:
                self._pacing.floor(self.guard.drafter, decoding, len(room) * self._longest)
            asked = self.guard.draft(self._slots[sequences], room, self._vocabulary)
            drafts, nodes = likeliest_chains(asked)
            chains = drafts
        filled = 0
        if self._pacing is not None:
            drafts = self._pacing.cut(chains, decoding)
            filled = self._longest if self._pacing.filled else 0
        self.statistics.withheld += len(chains.tokens) - len(drafts.tokens)
        self._last.note(sequences, drafts, asked.offsets, nodes, chains.offsets, filled)
        return drafts

    def _open_and_close(self, step: Step) -> None:
        """Open what is new; close what has ended, until `step_tokens` tokens of it are reached in this step.

        What of a reply is no source for others yet becomes one when it is closed, which costs as much as taking it in.
        """
        if len(step.closed):
            self._ending.extend(zip(self._slots[step.closed].tolist(), self._held[step.closed].tolist(), strict=True))
            self._slots[step.closed] = -1
            self._held[step.closed] = 0
        if len(step.opened):
            self._slots[step.opened] = self.guard.open(NO_TOKENS, np.zeros(len(step.opened) + 1, np.int64))
            self._lost[step.opened] = False
            self.statistics.opened += len(step.opened)
        closing: list[int] = []
        room = self._settings.step_tokens
        while self._ending and room > 0:
            slot, held = self._ending.popleft()
            closing.append(slot)
            room -= held
        if closing:
            self.guard.close(np.array(closing, np.int64))

    def _observe(self, step: Step, length: Int32, new: Int64, verified: Verified) -> None:
        """Tell the drafter what it asked for of the step that ended just now."""
        if self._tap is not None:
            ranked = self._tap.take(len(new))
            if ranked is None:
                return
            sequences, feedback = ranked_feedback(
                self.guard.feedback, ranked, self._last.notes, self._ready, step.sequences, step.previous, length, new
            )
            if len(sequences):
                self.guard.observe(self._slots[sequences], feedback)
        elif self.guard.feedback and len(verified.sequences):
            offsets = verified.offsets + np.arange(len(verified.offsets))
            self.guard.observe(self._slots[verified.sequences], Feedback(verified.accepted, offsets))

    def _pause_if_lost(self, sequences: Int64) -> None:
        """Pause where this step cost any of these their state; for those lost before there is a pause already."""
        lost = self.guard.retired(self._slots[sequences])
        if (lost & ~self._lost[sequences]).any():
            self._pause()
        self._lost[sequences] = lost

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
        self._slots[lost] = -1
        self._held[lost] = 0
        self._tracker.forget(lost)

    def _begin_anew(self) -> None:
        """After a failure of our own nothing is known for sure; leave some steps out, and forget all."""
        self._own_errors += 1
        if self._own_errors == 1:
            logger.exception("freedraft: a step of drafting failed; decoding goes on without (logged once)")
        try:
            self._pause()
            self._idle_until, self._retry_at = self._retry_at, 0
            slots = [*self._slots[self._slots >= 0].tolist(), *(slot for slot, _ in self._ending)]
            self._begin()
            self.guard.close(np.array(slots, np.int64))
        except Exception:
            logger.exception("freedraft: drafting can't be begun anew; decoding goes on without, for good")
            self._idle_until = NEVER


def _fill(answer: list[list[int]], new: Int64, length: Int32, tokens: Int32, longest: int) -> None:
    """Bring the drafts of all rows that got tokens to one length with the row's last token."""
    for row in np.flatnonzero(new).tolist():
        answer[row] += [int(tokens[row, length[row] - 1])] * (longest - len(answer[row]))


@kernel
def _how_rows_grew(
    sequences: Int64, previous: Int64, length: Int32, new: Int64, grew: Int64, call: int
) -> tuple[bool, Int64]:
    """Whether the step decoded and did nothing else; and the sequences that grew by other than new tokens, int64.

    A row decodes if it got tokens in this call and in the last: the last of a prompt's chunks, and a preempted row's
    return, bring a token as well. Where all of several that decode grew by others too, vLLM has left calls out: near
    `max_model_len` it asks for no row at all. Then they are the target's own tokens, and no sequence is told.

    Args:
        sequences: int64 `(rows,)`, -1 = none.
        previous: int64 `(rows,)`, each row's length when it was last seen, 0 = it is new.
        length: int32 `(rows or more,)`, its length now.
        new: int64 `(rows,)`, tokens of the last step.
        grew: int64, by sequence, the last call in which it got tokens; brought up to this one.
        call: number of this call, 1 or more.
    """
    rows = len(sequences)
    continued = np.empty(rows, np.int64)
    count = 0
    decoding = 0
    jumped = 0
    steady = True
    for i in range(rows):
        known = sequences[i] >= 0 and previous[i] > 0
        as_told = previous[i] + new[i] == length[i]
        decodes = known and new[i] > 0 and grew[sequences[i]] == call - 1
        steady &= decodes and as_told
        decoding += decodes
        jumped += decodes and not as_told
        if known and not as_told:
            continued[count] = sequences[i]
            count += 1
        if sequences[i] >= 0 and new[i] > 0:
            grew[sequences[i]] = call
    if jumped > 1 and jumped == decoding:
        count = 0
    return steady, continued[:count]


@kernel
def _who_drafts(
    sequences: Int64, ready: NDArray[np.bool_], new: Int64, length: Int32, width: int, longest: int, uniform: bool
) -> tuple[Int64, Int64, Int32]:
    """The rows that get a draft, their sequences, and how long it may be: int64, int64 and int32 `(n,)`.

    A draft of n tokens is followed by a token of the target's own, so one place must stay free. `uniform` = none gets a
    draft unless all that got tokens have room for the longest.
    """
    rows = sequences.shape[0]
    drafting = np.empty(rows, np.int64)
    room = np.empty(rows, np.int32)
    count = 0
    for i in range(rows):
        most = min(width - 1 - length[i], longest)
        if uniform and new[i] > 0 and most < longest:
            count = 0
            break
        if ready[i] and new[i] > 0 and most > 0:
            drafting[count] = i
            room[count] = most
            count += 1
    drafting = drafting[:count]
    return drafting, sequences[drafting], room[:count]

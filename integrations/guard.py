"""Fail open: a drafter's exception, or a draft that breaks the contract, never reaches the runtime."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from freedraft.plugins.base import Drafter, Drafts, Feedback, KeepsReplies, TakesReference
from freedraft.plugins.checks import checked_drafts, within_vocabulary
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import MAX_TOKEN, Int32, Int64

logger = logging.getLogger("freedraft")

RETIRED = -1
T = TypeVar("T")


class Guard:
    """A drafter with the same methods, whose failures are counted, logged once, and answered with no draft.

    A failure is an exception, or an answer that breaks the contract of `Drafter`: drafts that are malformed, or longer
    than their budget.

    After a failed `open` or `extend` nobody knows what the drafter holds for the sequences of that call. Their slots
    are retired: the drafter is asked to close them, `draft` is empty for them from then on, and `retired` tells the
    runtime which to close and open anew, if it wants to. A failed `draft` or `observe` changes no text, so it
    retires nothing.

    Slots here are the guard's own, so that one stays valid when the drafter's is gone. Calls from several threads
    wait for one another: a drafter need not be safe for them.

    Attributes:
        drafter: the drafter.
        feedback: as the drafter's.
        top_k: how many tokens of `Feedback.top_k` it wants a position: its attribute `feedback_top_k`, or 8.
        errors: the number of calls that failed.
        silent: log nothing; for a rehearsal, whose failures will come again.

    Raises:
        InputError: not a drafter, or a `feedback_top_k` that is no number above 0.
    """

    def __init__(self, drafter: Drafter) -> None:
        if isinstance(drafter, type) or not isinstance(drafter, Drafter):
            raise InputError(f"drafter: expected an object that is a Drafter, got {drafter!r}")
        self.drafter = drafter
        self.feedback = drafter.feedback
        wanted = getattr(drafter, "feedback_top_k", 8)
        if not isinstance(wanted, int) or wanted < 1:
            raise InputError(f"drafter: feedback_top_k must be a number above 0, got {wanted!r}")
        self.top_k = wanted
        self.errors = 0
        self.silent = False
        self._inner: Int64 = np.empty(0, np.int64)
        self._taken: NDArray[np.bool_] = np.empty(0, np.bool_)
        self._free: list[int] = []
        self._lock = threading.RLock()

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`; never raises."""
        with self._lock:
            slots = self._take(len(offsets) - 1)
            opened = self._attempt(lambda: _checked_slots(self.drafter.open(prompts, offsets), len(slots)))
            self._inner[slots] = RETIRED if opened is None else opened
            return slots

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`; never raises."""
        with self._lock:
            live = self._live(slots)
            if live is not None:
                if not live.any():
                    return
                lengths = np.diff(offsets)
                tokens, slots = tokens[np.repeat(live, lengths)], slots[live]
                offsets = np.concatenate([[0], np.cumsum(lengths[live])]).astype(np.int64)
            inner = self._inner[slots]
            if not self._ran(lambda: self.drafter.extend(inner, tokens, offsets)):
                self._retire(slots)

    def draft(self, slots: Int64, budget: Int32, vocabulary: int = MAX_TOKEN + 1) -> Drafts:
        """As `Drafter.draft`; no draft for retired slots, nor for any when the drafter fails.

        Args:
            slots: int64 `(n,)`.
            budget: int32 `(n,)`.
            vocabulary: a row with a token id that is this or higher gets no draft; the drafter does not know it.
        """
        with self._lock:
            live = self._live(slots)
            if live is not None and not live.any():
                return Drafts.empty(len(slots))
            inner, limits = (self._inner[slots], budget) if live is None else (self._inner[slots[live]], budget[live])
            drafts = self._attempt(lambda: checked_drafts(self.drafter.draft(inner, limits), limits))
        if drafts is None:
            return Drafts.empty(len(slots))
        drafts = within_vocabulary(drafts, vocabulary)
        if live is None:
            return drafts
        lengths = np.zeros(len(slots), np.int64)
        lengths[live] = np.diff(drafts.offsets)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Drafts(drafts.tokens, drafts.parents, drafts.probability, drafts.source, offsets)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """As `Drafter.observe`, of the slots that are not retired; never raises."""
        with self._lock:
            live = ~self.retired(slots)
            if not self.feedback or not live.any():
                return
            told = feedback if live.all() else _feedback_of(feedback, live)
            self._ran(lambda: self.drafter.observe(self._inner[slots[live]], told))

    def end_reply(self, slots: Int64) -> None:
        """As `KeepsReplies.end_reply`, of the slots that are not retired; never raises."""
        with self._lock:
            drafter = self.drafter
            live = slots[~self.retired(slots)]
            if isinstance(drafter, KeepsReplies) and len(live):
                self._ran(lambda: drafter.end_reply(self._inner[live]))

    def refer(self, slots: Int64, texts: Int32, offsets: Int64) -> None:
        """As `TakesReference.refer`; never raises. Skipped when any of the slots is retired."""
        with self._lock:
            drafter = self.drafter
            if isinstance(drafter, TakesReference) and not self.retired(slots).any():
                self._ran(lambda: drafter.refer(self._inner[slots], texts, offsets))

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`; never raises."""
        with self._lock:
            slots = np.unique(slots)
            self._retire(slots)
            self._free.extend(slot for slot in slots.tolist() if self._taken[slot])
            self._taken[slots] = False

    def retired(self, slots: Int64) -> NDArray[np.bool_]:
        """Bool `(n,)`: which of the slots lost their sequence to a failure."""
        return self._inner[slots] == RETIRED

    def _live(self, slots: Int64) -> NDArray[np.bool_] | None:
        """Bool `(n,)`: which of the slots are not retired; None where all of one or more are live."""
        inner = self._inner[slots]
        return None if len(inner) and inner.min() > RETIRED else inner != RETIRED

    def _take(self, count: int) -> Int64:
        if len(self._free) < count:
            old = len(self._inner)
            new = max(2 * old, old + count, 16)
            self._inner = np.concatenate([self._inner, np.full(new - old, RETIRED, np.int64)])
            self._taken = np.concatenate([self._taken, np.zeros(new - old, np.bool_)])
            self._free.extend(range(new - 1, old - 1, -1))
        slots = np.array([self._free.pop() for _ in range(count)], np.int64)
        self._taken[slots] = True
        return slots

    def _retire(self, slots: Int64) -> None:
        live = slots[~self.retired(slots)]
        inner = self._inner[live]
        self._inner[live] = RETIRED
        if len(inner):
            self._ran(lambda: self.drafter.close(inner))

    def _ran(self, call: Callable[[], None]) -> bool:
        def told() -> bool:
            call()
            return True

        return self._attempt(told) is not None

    def _attempt(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except Exception:
            self.errors += 1
            if self.errors == 1 and not self.silent:
                logger.exception("freedraft: the drafter failed; decoding goes on without its drafts (logged once)")
            return None


def _feedback_of(feedback: Feedback, rows: NDArray[np.bool_]) -> Feedback:
    """The feedback of some of its rows."""
    lengths = np.diff(feedback.offsets)
    positions = np.repeat(rows, lengths)
    offsets = np.zeros(int(rows.sum()) + 1, np.int64)
    np.cumsum(lengths[rows], out=offsets[1:])
    return Feedback(
        feedback.accepted[rows],
        offsets,
        None if feedback.argmax is None else feedback.argmax[positions],
        None if feedback.top_k is None else feedback.top_k[positions],
    )


def _checked_slots(slots: Int64, rows: int) -> Int64:
    if np.shape(slots) != (rows,) or np.asarray(slots).dtype.kind not in "iu" or (np.asarray(slots) < 0).any():
        raise InputError(f"the drafter's open: expected {rows} slots from 0 up, got {slots!r}")
    return slots

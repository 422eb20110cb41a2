"""Fail open: a drafter's exception never reaches the runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from freedraft.plugins.base import Drafter, Drafts, Feedback
from freedraft.retrieval.ragged import Int32, Int64
from numpy.typing import NDArray

logger = logging.getLogger("freedraft")

RETIRED = -1
T = TypeVar("T")


class Guard:
    """A drafter with the same methods, whose failures are counted, logged once, and answered with no draft.

    After a failed `open` or `extend` nobody knows what the drafter holds for the sequences of that call. Their slots
    are retired: the drafter is asked to close them, `draft` is empty for them from then on, and `retired` tells the
    runtime which to close and open anew, if it wants to. A failed `draft` or `observe` changes no text, so it
    retires nothing.

    Slots here are the guard's own, so that one stays valid when the drafter's is gone.

    Attributes:
        feedback: as the drafter's.
        errors: the number of calls that failed.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.feedback = drafter.feedback
        self.errors = 0
        self._inner: Int64 = np.empty(0, np.int64)
        self._free: list[int] = []

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`; never raises."""
        slots = self._take(len(offsets) - 1)
        none = np.full(len(slots), RETIRED, np.int64)
        self._inner[slots] = self._attempt(none, self.drafter.open, prompts, offsets)
        return slots

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`; never raises."""
        live = ~self.retired(slots)
        if not live.any():
            return
        if not live.all():
            lengths = np.diff(offsets)
            tokens, slots = tokens[np.repeat(live, lengths)], slots[live]
            offsets = np.concatenate([[0], np.cumsum(lengths[live])]).astype(np.int64)
        errors = self.errors
        self._attempt(None, self.drafter.extend, self._inner[slots], tokens, offsets)
        if self.errors > errors:
            self._retire(slots)

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`; no draft for retired slots, nor for any when the drafter fails."""
        live = ~self.retired(slots)
        if not live.any():
            return Drafts.empty(len(slots))
        nothing = Drafts.empty(int(live.sum()))
        drafts = self._attempt(nothing, self.drafter.draft, self._inner[slots[live]], budget[live])
        if live.all():
            return drafts
        lengths = np.zeros(len(slots), np.int64)
        lengths[live] = np.diff(drafts.offsets)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Drafts(drafts.tokens, drafts.parents, drafts.probability, drafts.source, offsets)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """As `Drafter.observe`; never raises. Skipped when any of the slots is retired."""
        if self.feedback and not self.retired(slots).any():
            self._attempt(None, self.drafter.observe, self._inner[slots], feedback)

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`; never raises."""
        self._retire(slots)
        self._free.extend(slots.tolist())

    def retired(self, slots: Int64) -> NDArray[np.bool_]:
        """Bool `(n,)`: which of the slots lost their sequence to a failure."""
        return self._inner[slots] == RETIRED

    def _take(self, count: int) -> Int64:
        if len(self._free) < count:
            old = len(self._inner)
            new = max(2 * old, old + count, 16)
            self._inner = np.concatenate([self._inner, np.full(new - old, RETIRED, np.int64)])
            self._free.extend(range(new - 1, old - 1, -1))
        return np.array([self._free.pop() for _ in range(count)], np.int64)

    def _retire(self, slots: Int64) -> None:
        live = slots[~self.retired(slots)]
        inner = self._inner[live]
        self._inner[live] = RETIRED
        if len(inner):
            self._attempt(None, self.drafter.close, inner)

    def _attempt(self, otherwise: T, call: Callable[..., T], *arguments: object) -> T:
        try:
            return call(*arguments)
        except Exception:
            self.errors += 1
            if self.errors == 1:
                logger.exception("freedraft: the drafter failed; decoding goes on without its drafts (logged once)")
            return otherwise

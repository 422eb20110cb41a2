"""The drafter's side of one call of `generate`: one sequence, from prompt to last token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from time import perf_counter

import numpy as np

from freedraft.integrations.guard import Guard
from freedraft.integrations.hf.draft import NO_DRAFT, Chain, Draft, as_chain, as_draft
from freedraft.integrations.hf.statistics import Statistics
from freedraft.plugins.base import Feedback
from freedraft.retrieval.ragged import Int32, Int64

logger = logging.getLogger("freedraft")

FIRST_RETRY = 16


class Drafting:
    """One sequence of a guarded drafter.

    When the drafter loses the sequence to a failure, it is opened anew with the whole text: after 16 more tokens, and
    then after twice as many each time, so that a drafter that always fails costs little.

    Args:
        guard: the drafter.
        statistics: where its time and its errors are counted.
        why_no_trees: the reason why a tree is to be cut down to its likeliest branch; None leaves it whole.
    """

    def __init__(self, guard: Guard, statistics: Statistics, why_no_trees: str | None = None) -> None:
        self._guard = guard
        self._statistics = statistics
        self._why_no_trees = why_no_trees
        self._errors_before = guard.errors
        self._slots: Int64 | None = None
        self._text: list[int] = []
        self._vocabulary = 0
        self._retry_after = FIRST_RETRY
        self._retry_at: int | None = None

    @property
    def feedback(self) -> frozenset[str]:
        """What the drafter wants to be told."""
        return self._guard.feedback

    @property
    def top_k(self) -> int:
        """How many tokens of `Feedback.top_k` it wants a position."""
        return int(getattr(self._guard.drafter, "feedback_top_k", 8))

    def open(self, prompt: Int32, vocabulary: int) -> None:
        """Start with `prompt` int32 `(n,)`; drafts with ids from `vocabulary` up are refused."""
        started = perf_counter()
        self._text = prompt.tolist()
        self._vocabulary = vocabulary
        self._slots = self._guard.open(prompt, np.array([0, len(prompt)], np.int64))
        self._statistics.drafting_seconds += perf_counter() - started

    def draft(self, budget: int) -> Draft:
        """A draft of at most `budget` tokens."""
        if budget <= 0 or self._slots is None:
            return NO_DRAFT
        started = perf_counter()
        drafts = self._guard.draft(self._slots, np.array([budget], np.int32), self._vocabulary)
        draft = NO_DRAFT if not len(drafts.tokens) else as_draft(drafts)
        if not isinstance(draft, Chain) and self._why_no_trees is not None:
            log_once(f"freedraft: of trees only the likeliest branch is verified: {self._why_no_trees}")
            draft = as_chain(drafts)
        self._statistics.drafting_seconds += perf_counter() - started
        return draft

    def commit(self, tokens: Sequence[int], feedback: Feedback | None) -> None:
        """Tell the outcome of the last verification, then the tokens that it committed."""
        assert self._slots is not None
        started = perf_counter()
        if feedback is not None:
            self._guard.observe(self._slots, feedback)
        self._text.extend(tokens)
        if not self._guard.retired(self._slots)[0]:
            self._guard.extend(self._slots, np.array(tokens, np.int32), np.array([0, len(tokens)], np.int64))
        else:
            self._reopen_when_due()
        self._statistics.drafting_seconds += perf_counter() - started

    def close(self) -> None:
        """End the sequence; more than once does nothing."""
        if self._slots is not None:
            self._guard.close(self._slots)
            self._slots = None
        self._statistics.drafter_errors = self._guard.errors - self._errors_before

    def _reopen_when_due(self) -> None:
        if self._retry_at is None:
            self._retry_at = len(self._text) + self._retry_after
        elif len(self._text) >= self._retry_at:
            assert self._slots is not None
            self._guard.close(self._slots)
            text = np.array(self._text, np.int32)
            self._slots = self._guard.open(text, np.array([0, len(text)], np.int64))
            self._retry_after *= 2
            self._retry_at = None


@cache
def log_once(message: str) -> None:
    """Log `message` as a warning, the first time only."""
    logger.warning(message)

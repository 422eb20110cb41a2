"""The drafter's side of one call of `generate`: one sequence, from prompt to last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from freedraft.integrations.guard import Guard
from freedraft.integrations.hf.statistics import Statistics
from freedraft.plugins.base import Drafts, Feedback
from freedraft.retrieval.ragged import Int32, Int64

FIRST_RETRY = 16


@dataclass(frozen=True, slots=True)
class Chain:
    """A draft with one branch.

    Nodes are numbered as positions of the forward pass: 0 is the last committed token, `1 + j` is draft token j.
    """

    tokens: list[int]

    @property
    def width(self) -> int:
        """Positions of the forward pass that verifies it."""
        return 1 + len(self.tokens)

    def drafted(self, node: int) -> list[int]:
        """The draft tokens that follow `node`."""
        return self.tokens[node : node + 1]

    def child(self, node: int, token: int) -> int | None:
        """The node of draft token `token` behind `node`, None when it was not drafted."""
        return node + 1 if node < len(self.tokens) and self.tokens[node] == token else None

    def before(self, ends: frozenset[int]) -> Chain:
        """The draft up to the first token of `ends`, without it: the target gives that one for nothing."""
        for i, token in enumerate(self.tokens):
            if token in ends:
                return Chain(self.tokens[:i])
        return self


NO_DRAFT = Chain([])


class Drafting:
    """One sequence of a guarded drafter.

    When the drafter loses the sequence to a failure, it is opened anew with the whole text: after 16 more tokens, and
    then after twice as many each time, so that a drafter that always fails costs little.
    """

    def __init__(self, guard: Guard, statistics: Statistics) -> None:
        self._guard = guard
        self._statistics = statistics
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

    def draft(self, budget: int) -> Chain:
        """A draft of at most `budget` tokens."""
        if budget <= 0 or self._slots is None:
            return NO_DRAFT
        started = perf_counter()
        drafts = self._guard.draft(self._slots, np.array([budget], np.int32), self._vocabulary)
        chain = as_chain(drafts) if len(drafts.tokens) else NO_DRAFT
        self._statistics.drafting_seconds += perf_counter() - started
        return chain

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


def as_chain(drafts: Drafts) -> Chain:
    """The likeliest branch of the first row, from the committed text to a leaf."""
    row = drafts.row(0)
    tokens, parents = drafts.tokens[row], drafts.parents[row]
    if parents.tolist() == list(range(-1, len(parents) - 1)):
        return Chain(tokens.tolist())
    likelihood = drafts.probability[row]
    path, node = [], -1
    while len(children := np.flatnonzero(parents == node)):
        node = int(children[likelihood[children].argmax()])
        path.append(int(tokens[node]))
    return Chain(path)

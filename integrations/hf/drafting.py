"""The drafter's side of one call of `generate`: its sequences, from prompt to last token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import numpy as np

from freedraft.integrations.guard import Guard
from freedraft.integrations.hf.draft import NO_DRAFT, Chain, Draft, Tree, as_draft
from freedraft.integrations.hf.feedback import of_all_nodes, together
from freedraft.integrations.hf.row import Step
from freedraft.integrations.hf.statistics import Statistics
from freedraft.plugins.base import Drafts, Feedback
from freedraft.plugins.branches import likeliest_chains
from freedraft.plugins.pacing import Pacer
from freedraft.retrieval.ragged import Int32, Int64

logger = logging.getLogger("freedraft")

FIRST_RETRY = 16


@dataclass(slots=True)
class Text:
    """What a sequence is opened anew with, should the drafter lose it.

    Attributes:
        tokens: prompt and output so far.
        reference: a text that the output may resemble; empty = none.
        retry_after: tokens to wait from the loss on.
        retry_at: the length at which to open it; None while it is not lost.
    """

    tokens: list[int]
    reference: Int32
    retry_after: int = FIRST_RETRY
    retry_at: int | None = None

    def due(self) -> bool:
        """Whether to open it anew now; asked after each step in which it is lost."""
        if self.retry_at is None:
            self.retry_at = len(self.tokens) + self.retry_after
            return False
        if len(self.tokens) < self.retry_at:
            return False
        self.retry_after *= 2
        self.retry_at = None
        return True


class Drafting:
    """The sequences of a guarded drafter; lists have one item for each that has not ended.

    When the drafter loses a sequence to a failure, it is opened anew with the whole text: after 16 more tokens, and
    then after twice as many each time, so that a drafter that always fails costs little.

    Args:
        guard: the drafter.
        statistics: where its time and its errors are counted.
        why_no_trees: the reason why a tree is to be cut down to its likeliest branch; None leaves it whole.
        pacer: cuts drafts to what pays; None leaves them whole.
        references: int32, texts that the outputs may resemble, one a sequence; empty = none.
    """

    def __init__(
        self,
        guard: Guard,
        statistics: Statistics,
        why_no_trees: str | None = None,
        pacer: Pacer | None = None,
        references: Sequence[Int32] = (),
    ) -> None:
        self._guard = guard
        self._statistics = statistics
        self._why_no_trees = why_no_trees
        self._pacer = pacer
        self._references = references
        self._drafts = self._asked = Drafts.empty(0)
        self._shapes: list[Draft] = []
        self._errors_before = guard.errors
        self._slots: Int64 = np.empty(0, np.int64)
        self._texts: list[Text] = []
        self._vocabulary = 0

    @property
    def feedback(self) -> frozenset[str]:
        """What the drafter wants to be told."""
        return self._guard.feedback

    @property
    def top_k(self) -> int:
        """How many tokens of `Feedback.top_k` it wants a position."""
        return self._guard.top_k

    def open(self, prompts: Sequence[Int32], vocabulary: int) -> None:
        """Start with `prompts` int32; drafts with ids from `vocabulary` up are refused."""
        started = perf_counter()
        references = self._references or [np.empty(0, np.int32)] * len(prompts)
        self._texts = [Text(prompt.tolist(), text) for prompt, text in zip(prompts, references, strict=True)]
        self._vocabulary = vocabulary
        self._slots = self._open(prompts, references)
        self._statistics.drafting_seconds += perf_counter() - started

    def draft(self, budgets: Sequence[int]) -> list[Draft]:
        """Drafts of at most so many tokens, no longer than pays where drafts are paced."""
        count = len(budgets)
        if max(budgets) <= 0:
            self._drafts = self._asked = self._paced(Drafts.empty(count))
            self._shapes = [NO_DRAFT] * count
            return self._shapes
        started = perf_counter()
        drafts = self._guard.draft(self._slots, np.array(budgets, np.int32), self._vocabulary)
        self._asked = drafts
        self._statistics.proposed += len(drafts.tokens)
        if self._why_no_trees is not None:
            chains, _ = likeliest_chains(drafts)
            if len(chains.tokens) < len(drafts.tokens):
                log_once(f"freedraft: of trees only the likeliest branch is verified: {self._why_no_trees}")
                drafts = chains
        self._drafts = drafts = self._paced(drafts)
        self._shapes = [as_draft(drafts, row) for row in range(count)]
        self._statistics.drafting_seconds += perf_counter() - started
        return self._shapes

    def commit(
        self,
        committed: Sequence[Sequence[int]],
        verified: Sequence[Draft] = (),
        feedback: Sequence[Feedback | None] = (),
    ) -> None:
        """Tell the outcome of the last verification, then the tokens that it committed; no feedback after a prompt."""
        started = perf_counter()
        lost = self._guard.retired(self._slots)
        told = [
            of_all_nodes(one, draft, self._asked, row)
            for row, (one, draft) in enumerate(zip(feedback, verified, strict=True))
            if one is not None and not lost[row]
        ]
        if told:
            self._guard.observe(self._slots[~lost], together(told))
        for text, tokens in zip(self._texts, committed, strict=True):
            text.tokens.extend(tokens)
        # A lost sequence is skipped by the guard.
        flat = [token for tokens in committed for token in tokens]
        self._guard.extend(self._slots, np.array(flat, np.int32), _offsets([len(tokens) for tokens in committed]))
        if lost.any():
            self._reopen(np.flatnonzero(lost))
        self._statistics.drafting_seconds += perf_counter() - started

    def _paced(self, drafts: Drafts) -> Drafts:
        if self._pacer is None:
            return drafts
        try:
            return self._pacer.cut(drafts, drafts.rows, padded=True)
        except Exception:
            self._give_up_pacing()
            return drafts

    def measured(self, drafts: Sequence[Draft], steps: Sequence[Step], seconds: float) -> None:
        """Tell the pacer of a step that was not the first: its drafts, what came of them, its time from end to end."""
        if self._pacer is None:
            return
        try:
            # Shorter drafts were padded.
            drafted = len(drafts) * (max(draft.width for draft in drafts) - 1)
            self._pacer.record(len(drafts), drafted, seconds, any(isinstance(draft, Tree) for draft in drafts))
            self._judge(self._pacer, drafts, steps)
        except Exception:
            self._give_up_pacing()

    def _judge(self, pacer: Pacer, drafts: Sequence[Draft], steps: Sequence[Step]) -> None:
        rows, lengths, last = [], [], []
        for row, (draft, step) in enumerate(zip(drafts, steps, strict=True)):
            # Where the text ended, what was left of a draft was not looked at. A chain loses its end to `before`; of a
            # tree that lost nodes so it is not known any more which they were.
            if draft.tokens and not step.done and (draft is self._shapes[row] or isinstance(self._shapes[row], Chain)):
                start = self._drafts.row(row).start
                rows.append(np.arange(start, start + len(draft.tokens)))
                lengths.append(len(draft.tokens))
                last.append(step.last - 1)
        if rows:
            nodes = np.concatenate(rows)
            pacer.judge(self._drafts.probability[nodes], _offsets(lengths), np.array(last), self._drafts.parents[nodes])

    def _give_up_pacing(self) -> None:
        """Go on without pacing, for this call."""
        logger.exception("freedraft: pacing failed; drafts are verified as they are")
        self._pacer = None

    def end(self, ended: Sequence[bool]) -> None:
        """Close sequences, one flag each."""
        over = np.array(ended, np.bool_)
        self._guard.close(self._slots[over])
        self._slots = self._slots[~over]
        self._texts = [text for text, gone in zip(self._texts, ended, strict=True) if not gone]

    def close(self) -> None:
        """End what is left; more than once does nothing."""
        if len(self._slots):
            self._guard.close(self._slots)
            self._slots = self._slots[:0]
        self._statistics.drafter_errors = self._guard.errors - self._errors_before

    def _reopen(self, lost: Int64) -> None:
        for row in lost.tolist():
            if self._texts[row].due():
                self._guard.close(self._slots[row : row + 1])
                text = self._texts[row]
                self._slots[row : row + 1] = self._open([np.array(text.tokens, np.int32)], [text.reference])

    def _open(self, texts: Sequence[Int32], references: Sequence[Int32]) -> Int64:
        slots = self._guard.open(np.concatenate(texts), _offsets([len(text) for text in texts]))
        if any(len(text) for text in references):
            self._guard.refer(slots, np.concatenate(references), _offsets([len(text) for text in references]))
        return slots


def _offsets(lengths: Sequence[int]) -> Int64:
    offsets: Int64 = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return offsets


@cache
def log_once(message: str) -> None:
    """Log `message` as a warning, the first time only."""
    logger.warning(message)

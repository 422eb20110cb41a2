"""The decoding loop: draft, verify in one forward pass, commit, and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch

from freedraft.integrations.hf.draft import NO_DRAFT, Draft
from freedraft.integrations.hf.drafting import Drafting
from freedraft.integrations.hf.row import Row, Step
from freedraft.integrations.hf.statistics import Statistics
from freedraft.integrations.hf.target import Target
from freedraft.retrieval.ragged import Int32


@dataclass(slots=True)
class Loop:
    """One call of `generate`, as

        run the prompts
        repeat
            for each sequence: commit what the target chooses, along the draft, while it chooses what was drafted
            take the rejected tokens out of the cache
            tell the drafter; ask it for drafts; run the drafts
        until a stopping criterion says so for each sequence, after any token

    The last committed token is never in the cache: it goes in with the next draft, as its root.

    Attributes:
        live: the rows that have not ended.
    """

    target: Target
    rows: Sequence[Row]
    drafting: Drafting
    statistics: Statistics
    max_draft: int = 64
    live: list[Row] = field(default_factory=list)

    def run(self, input_ids: torch.Tensor, prompts: Sequence[Int32]) -> None:
        """Decode to the end.

        Args:
            input_ids: int64 `(rows, n)`.
            prompts: int32, what the drafter is to see of each prompt: all but padding.
        """
        self.live = list(self.rows)
        self._prefill(input_ids, prompts)
        with self.target.decoding():
            while self.live:
                started = perf_counter()
                rooms = [row.stopping.room(row.tokens.length, self.max_draft) for row in self.live]
                drafted = zip(self.drafting.draft(rooms), self.live, strict=True)
                drafts = [draft.before(row.stopping.ends) for draft, row in drafted]
                steps = self._verify(drafts)
                self.drafting.measured(drafts, steps, perf_counter() - started)
                self._end(steps)

    def _prefill(self, input_ids: torch.Tensor, prompts: Sequence[Int32]) -> None:
        started = perf_counter()
        outputs = self.target.prefill(input_ids)
        launched = perf_counter()
        # On an accelerator the prompt is still being worked on while the drafter reads it.
        self.drafting.open(prompts, outputs.logits.shape[-1])
        opened = perf_counter()
        self._begin(outputs, [NO_DRAFT] * len(self.live), None)
        self.statistics.prefill_seconds += launched - started + perf_counter() - opened
        self.statistics.prefilled(len(self.live))
        steps = self._commit()
        for row in self.live:
            row.verification.end()
        self.drafting.commit([step.committed for step in steps])
        self._end(steps)

    def _verify(self, drafts: Sequence[Draft]) -> list[Step]:
        started = perf_counter()
        cached = self.target.cached
        outputs = self.target.verify([row.tokens for row in self.live], drafts)
        self._begin(outputs, drafts, cached)
        self.statistics.verified([len(draft.tokens) for draft in drafts], perf_counter() - started)
        steps = self._commit()
        self.target.keep(drafts, [step.last for step in steps])
        feedback = []
        for row, step in zip(self.live, steps, strict=True):
            feedback.append(row.verification.feedback(self.drafting.feedback, self.drafting.top_k, step.accepted))
            row.verification.end()
        self.drafting.commit([step.committed for step in steps], drafts, feedback)
        return steps

    def _begin(self, outputs: Any, drafts: Sequence[Draft], cached: int | None) -> None:
        for i, (row, draft) in enumerate(zip(self.live, drafts, strict=True)):
            row.begin(outputs, i, draft, cached, partial(self.target.columns, i))

    def _commit(self) -> list[Step]:
        steps = [row.commit() for row in self.live]
        for step in steps:
            self.statistics.committed(len(step.committed), step.accepted)
        return steps

    def _end(self, steps: Sequence[Step]) -> None:
        ended = [step.done for step in steps]
        if not any(ended):
            return
        self.drafting.end(ended)
        self.live = [row for row, over in zip(self.live, ended, strict=True) if not over]
        if self.live:
            self.target.end(ended)

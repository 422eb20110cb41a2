"""The decoding loop: draft, verify in one forward pass, commit, and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from freedraft.integrations.hf.draft import NO_DRAFT, Draft
from freedraft.integrations.hf.drafting import Drafting
from freedraft.integrations.hf.recorder import Recorder
from freedraft.integrations.hf.statistics import Statistics
from freedraft.integrations.hf.stopping import Stopping
from freedraft.integrations.hf.target import Target
from freedraft.integrations.hf.tokens import Tokens
from freedraft.integrations.hf.verification import Verification
from freedraft.retrieval.ragged import Int32


@dataclass(slots=True)
class Step:
    """What a forward pass came to.

    Attributes:
        committed: the new tokens of the text, at least one.
        accepted: how many of them had been drafted.
        last: the node of the draft behind which the last of them was chosen.
        done: a stopping criterion said so after the last of them.
    """

    committed: list[int] = field(default_factory=list)
    accepted: int = 0
    last: int = 0
    done: bool = False


@dataclass(slots=True)
class Loop:
    """One call of `generate`, as

        run the prompt
        repeat
            commit what the target chooses, along the draft, while it chooses what was drafted
            take the rejected tokens out of the cache
            tell the drafter; ask it for a draft; run the draft
        until a stopping criterion says so, after any token

    The last committed token is never in the cache: it goes in with the next draft, as its root.
    """

    target: Target
    tokens: Tokens
    drafting: Drafting
    verification: Verification
    stopping: Stopping
    recorder: Recorder
    statistics: Statistics
    streamer: Any = None
    max_draft: int = 64

    def run(self, prompt: Int32) -> torch.Tensor:
        """Decode to the end; return int64 `(1, length)`, prompt and output.

        Args:
            prompt: int32 `(n,)`, what the drafter is to see of the prompt: all but padding.
        """
        if self.streamer is not None:
            self.streamer.put(self.tokens.committed().cpu())
        step = self._prefill(prompt)
        with self.target.decoding():
            while not step.done:
                room = self.stopping.room(self.tokens.length, self.max_draft)
                step = self._verify(self.drafting.draft(room).before(self.stopping.ends))
        if self.streamer is not None:
            self.streamer.end()
        return self.tokens.committed().clone()

    def _prefill(self, prompt: Int32) -> Step:
        started = perf_counter()
        outputs = self.target.prefill(self.tokens.committed())
        launched = perf_counter()
        # On an accelerator the prompt is still being worked on while the drafter reads it.
        self.drafting.open(prompt, outputs.logits.shape[-1])
        opened = perf_counter()
        self.recorder.begin(outputs, None, NO_DRAFT)
        token = self._first_choice(outputs.logits, NO_DRAFT)
        self.statistics.prefill_seconds += launched - started + perf_counter() - opened
        self.statistics.forward_passes += 1
        step = self._commit(NO_DRAFT, token)
        self.verification.end()
        self.drafting.commit(step.committed, None)
        return step

    def _verify(self, draft: Draft) -> Step:
        started = perf_counter()
        outputs = self.target.verify(self.tokens.with_draft(draft.tokens), draft)
        self.recorder.begin(outputs, self.target.cached - draft.width, draft)
        token = self._first_choice(outputs.logits, draft)
        self.statistics.verified(len(draft.tokens), perf_counter() - started)
        step = self._commit(draft, token)
        self.target.keep(draft, step.last)
        feedback = self.verification.feedback(self.drafting.feedback, self.drafting.top_k, step.accepted)
        self.verification.end()
        self.drafting.commit(step.committed, feedback)
        return step

    def _first_choice(self, logits: torch.Tensor, draft: Draft) -> int:
        committed = self.tokens.committed()
        self.verification.begin(logits, draft, committed)
        return self.verification.choose(0, committed)

    def _commit(self, draft: Draft, token: int) -> Step:
        """Commit `token`, and on along the draft."""
        step = Step()
        node: int | None = 0
        while node is not None and not step.done:
            if step.committed:
                token = self.verification.choose(node, self.tokens.committed())
            self.tokens.append(token)
            step.committed.append(token)
            step.last = node
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            step.done = self.stopping(token, self.tokens.committed(), self.recorder.scores)
            node = draft.child(node, token)
            step.accepted += node is not None
        self.statistics.committed(len(step.committed), step.accepted)
        return step

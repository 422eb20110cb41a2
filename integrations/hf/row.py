"""One sequence of a call: what a forward pass adds to its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from freedraft.integrations.hf.draft import NO_DRAFT, Draft
from freedraft.integrations.hf.recorder import Recorder
from freedraft.integrations.hf.stopping import Stopping
from freedraft.integrations.hf.tokens import Tokens
from freedraft.integrations.hf.verification import Verification


@dataclass(slots=True)
class Step:
    """What a forward pass came to, for one sequence.

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
class Row:
    """One sequence, decoded on its own: all that the others share with it is the forward pass.

    Attributes:
        tokens: its text.
        verification: chooses its tokens.
        stopping: its stopping criteria.
        recorder: what is to be returned of it beside the text.
        streamer: is given every token; None where there is none.
    """

    tokens: Tokens
    verification: Verification
    stopping: Stopping
    recorder: Recorder
    streamer: Any = None
    _draft: Draft = NO_DRAFT
    _first: int = 0

    def begin(self, outputs: Any, place: int, draft: Draft, cached: int | None, columns: Callable[[], Any]) -> None:
        """Take a forward pass over `draft`, and choose the first token.

        Args:
            outputs: the model's; its logits are those of the draft, padded behind, or end with the prompt's last.
            place: the sequence's row of `outputs`.
            draft: what it verifies.
            cached: see `Recorder.begin`.
            columns: likewise.
        """
        self._draft = draft
        self.recorder.begin(outputs, cached, draft, place, columns)
        committed = self.tokens.committed()
        logits = outputs.logits[place : place + 1]
        self.verification.begin(logits if cached is None else logits[:, : draft.width], draft, committed)
        self._first = self.verification.choose(0, committed)

    def commit(self) -> Step:
        """Commit the first token, and on along the draft."""
        step, token = Step(), self._first
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
            node = self._draft.child(node, token)
            step.accepted += node is not None
        return step

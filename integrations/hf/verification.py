"""Verification of one forward pass: the target's choice at each position, and what it showed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from freedraft.integrations.hf.acceptance import AcceptanceRule
from freedraft.integrations.hf.draft import NO_DRAFT, Draft
from freedraft.integrations.hf.processors import ProcessedScores
from freedraft.integrations.hf.recorder import Recorder
from freedraft.plugins.base import Feedback


class Verification:
    """Turns the logits of a pass into choices, one position after the other.

    Args:
        rule: the acceptance rule.
        processors: applied to the scores of a position before the rule sees them.
        recorder: is told of every choice.
        device: where scores are processed, and random numbers drawn, as in plain decoding: that of the prompt.
    """

    def __init__(
        self, rule: AcceptanceRule, processors: LogitsProcessorList, recorder: Recorder, device: torch.device
    ) -> None:
        self._rule = rule
        self._scores = ProcessedScores(processors, device)
        self._recorder = recorder
        self._draft: Draft = NO_DRAFT
        self._choices: list[int] | None = None

    def begin(self, logits: torch.Tensor, draft: Draft, committed: torch.Tensor) -> None:
        """Take the logits `(1, positions, vocabulary)` of a pass whose last positions verify `draft`."""
        self._draft = draft
        self._scores.begin(logits, draft.width)
        self._choices = self._rule.choose_all(self._scores.block(committed)) if self._scores.as_block else None

    def choose(self, node: int, committed: torch.Tensor) -> int:
        """The token to commit behind `committed` int64 `(1, length)`, which ends with draft node `node`."""
        processed = None
        if self._choices is None or self._recorder.scores is not None:
            processed = self._scores.row(node, committed)
        if self._choices is not None:
            token = self._choices[node]
        else:
            token = self._rule.choose(processed, self._draft.drafted(node))
        self._recorder.token(node, self._scores.raw, processed)
        return token

    def feedback(self, kinds: frozenset[str], top_k: int, accepted: int) -> Feedback | None:
        """What a drafter that wants `kinds` is told of this pass; None for one that wants nothing."""
        if not kinds:
            return None
        raw = self._scores.raw
        return Feedback(
            accepted=np.array([accepted], np.int32),
            offsets=np.array([0, self._draft.width], np.int64),
            argmax=_int32(raw.argmax(dim=-1)) if "argmax" in kinds else None,
            top_k=_int32(raw.topk(min(top_k, raw.shape[-1]), dim=-1).indices) if "top_k" in kinds else None,
        )

    def end(self) -> None:
        """Let go of the logits."""
        self._scores.release()


def _int32(ids: torch.Tensor) -> Any:
    return ids.to(dtype=torch.int32, device="cpu").numpy()

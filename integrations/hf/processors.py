"""Logits processors, applied to the positions of one forward pass."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

_POSITION_INDEPENDENT = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
"""transformers' processors that look at nothing but the scores of one position."""


def position_independent(processors: LogitsProcessorList) -> bool:
    """Whether every processor treats a row of scores alike, whatever its prefix and the calls before."""
    known = {getattr(logits_process, name, None) for name in _POSITION_INDEPENDENT}
    # Exact types: a subclass may keep state.
    return all(type(processor) in known for processor in processors)


class ProcessedScores:
    """The target's scores at the positions of one forward pass, processed when they are asked for.

    A position is processed only once its prefix is committed, so every processor sees the calls that plain decoding
    makes: each prefix once and in order, and none beyond a rejected draft token.

    With position-independent processors, `as_block` is true where one call for all positions is the cheaper way: on
    an accelerator, where a launch costs more than the work. On a CPU a call for each committed position is cheaper,
    for rejected positions then cost nothing (top-p sorts the vocabulary).
    """

    def __init__(self, processors: LogitsProcessorList, device: torch.device) -> None:
        self._processors = processors
        self.as_block = not processors or (device.type != "cpu" and position_independent(processors))
        self._device = device
        self.raw: torch.Tensor = torch.empty(0)
        self._block: torch.Tensor | None = None

    def begin(self, logits: torch.Tensor, width: int) -> None:
        """Take the last `width` positions of `logits` `(1, positions, vocabulary)`; `raw` is `(width, vocabulary)`."""
        self.raw = logits[0, -width:].to(dtype=torch.float32, device=self._device)
        self._block = None

    def block(self, committed: torch.Tensor) -> torch.Tensor:
        """Processed scores of all positions, float32 `(width, vocabulary)`; only if `as_block`."""
        if self._block is None:
            # A copy, for processors may write in place and the raw logits may still be wanted.
            self._block = self._processors(committed, self.raw.clone()) if self._processors else self.raw
        return self._block

    def row(self, node: int, committed: torch.Tensor) -> torch.Tensor:
        """Processed scores float32 `(1, vocabulary)` of position `node`, whose prefix is `committed`."""
        if self.as_block:
            return self.block(committed)[node : node + 1]
        return self._processors(committed, self.raw[node : node + 1].clone())

    def release(self) -> None:
        """Let go of the logits: those of a whole prompt can be large."""
        self.raw, self._block = torch.empty(0), None

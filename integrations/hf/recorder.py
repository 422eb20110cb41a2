"""What `return_dict_in_generate` asks for: one entry a generated token, as plain decoding returns them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from freedraft.integrations.hf.draft import NO_DRAFT, Chain, Draft

Layers = tuple[torch.Tensor | None, ...]


class Recorder:
    """Collects scores, logits, hidden states and attentions; all of them None unless asked for.

    Attributes:
        scores: processed scores float32 `(1, vocabulary)` a token.
    """

    def __init__(self, generation_config: Any, windows: list[int | None]) -> None:
        def wanted(name: str) -> tuple[Any, ...] | None:
            return () if generation_config.return_dict_in_generate and getattr(generation_config, name) else None

        self.returns_dict = bool(generation_config.return_dict_in_generate)
        self.scores: tuple[torch.Tensor, ...] | None = wanted("output_scores")
        self._logits: tuple[torch.Tensor, ...] | None = wanted("output_logits")
        self._hidden_states: tuple[Layers, ...] | None = wanted("output_hidden_states")
        self._attentions: tuple[Layers, ...] | None = wanted("output_attentions")
        self._windows = windows
        self._outputs: Any = None
        self._cached: int | None = None
        self._draft: Draft = NO_DRAFT

    def begin(self, outputs: Any, cached: int | None, draft: Draft) -> None:
        """Start on a forward pass; `cached` is the cache's length before it, None for the pass over the prompt."""
        if self._hidden_states is not None or self._attentions is not None:
            self._outputs, self._cached, self._draft = outputs, cached, draft

    def token(self, node: int, raw: torch.Tensor, processed: torch.Tensor | None) -> None:
        """A token was chosen at position `node`.

        Args:
            node: position within the pass.
            raw: logits `(positions, vocabulary)` of the pass.
            processed: float32 `(1, vocabulary)`; needed only where `scores` is not None.
        """
        if self.scores is not None:
            assert processed is not None
            self.scores += (processed.clone(),)
        if self._logits is not None:
            self._logits += (raw[node : node + 1].clone(),)
        if self._hidden_states is not None:
            states = self._outputs.hidden_states
            # The first entry covers the whole prompt.
            self._hidden_states += (
                (states if self._cached is None else tuple(layer[:, node : node + 1] for layer in states)),
            )
        if self._attentions is not None:
            attentions = self._outputs.attentions
            if self._cached is not None:
                attentions = tuple(self._attention_row(i, layer, node) for i, layer in enumerate(attentions))
            self._attentions += (attentions,)

    def result(self, sequences: torch.Tensor, cache: Any) -> Any:
        """What `generate` returns."""
        if not self.returns_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self.scores,
            logits=self._logits,
            attentions=self._attentions,
            hidden_states=self._hidden_states,
            past_key_values=cache,
        )

    def _attention_row(self, layer: int, attention: torch.Tensor | None, node: int) -> torch.Tensor | None:
        """Row `node` of `(1, heads, width, keys)`, with the keys that plain decoding would have had in its cache."""
        if attention is None:
            return None
        assert self._cached is not None
        path = self._draft.path(node)
        position = self._cached + len(path) - 1
        window = self._windows[layer] if layer < len(self._windows) else None
        oldest = 0 if window is None else max(0, position - window + 1)
        first = self._cached + attention.shape[2] - attention.shape[3]
        row = attention[:, :, node : node + 1]
        if isinstance(self._draft, Chain):
            return row[..., oldest - first : position + 1 - first]
        # The past, then the node's own branch, where the past ends after `cached - first` keys.
        keys = [*range(self._cached - first), *(self._cached - first + place for place in path)]
        return row[..., keys[oldest - first :]]

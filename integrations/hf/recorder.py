"""What `return_dict_in_generate` asks for: one entry a generated token, as plain decoding returns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from freedraft.integrations.hf.draft import NO_DRAFT, Chain, Draft

Layers = tuple[torch.Tensor | None, ...]


class Recorder:
    """Collects scores, logits, hidden states and attentions of one sequence; all of them None unless asked for.

    Attributes:
        scores: processed scores float32 `(1, vocabulary)` a token.
        logits: likewise, not processed.
        hidden_states: for each token those of every layer.
        attentions: likewise.
    """

    def __init__(self, generation_config: Any, windows: list[int | None]) -> None:
        def wanted(name: str) -> tuple[Any, ...] | None:
            return () if generation_config.return_dict_in_generate and getattr(generation_config, name) else None

        self.returns_dict = bool(generation_config.return_dict_in_generate)
        self.scores: tuple[torch.Tensor, ...] | None = wanted("output_scores")
        self.logits: tuple[torch.Tensor, ...] | None = wanted("output_logits")
        self.hidden_states: tuple[Layers, ...] | None = wanted("output_hidden_states")
        self.attentions: tuple[Layers, ...] | None = wanted("output_attentions")
        self._windows = windows
        self._outputs: Any = None
        self._cached: int | None = None
        self._draft: Draft = NO_DRAFT
        self._row = slice(0, 1)
        self._columns: Callable[[], list[int] | None] = lambda: None

    def begin(
        self,
        outputs: Any,
        cached: int | None,
        draft: Draft,
        row: int = 0,
        columns: Callable[[], list[int] | None] = lambda: None,
    ) -> None:
        """Start on a forward pass.

        Args:
            outputs: the model's.
            cached: slots in the cache before it, None for the pass over the prompt.
            draft: what it verifies.
            row: the sequence's row of `outputs`.
            columns: gives the slots among `cached` that hold the sequence's text, None for all of them.
        """
        if self.hidden_states is not None or self.attentions is not None:
            self._outputs, self._cached, self._draft = outputs, cached, draft
            self._row, self._columns = slice(row, row + 1), columns

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
        if self.logits is not None:
            self.logits += (raw[node : node + 1].clone(),)
        if self.hidden_states is not None:
            states = self._outputs.hidden_states
            # The first entry covers the whole prompt.
            nodes = slice(None) if self._cached is None else slice(node, node + 1)
            self.hidden_states += (tuple(layer[self._row, nodes] for layer in states),)
        if self.attentions is not None:
            attentions = self._outputs.attentions
            self.attentions += (tuple(self._attention_row(i, layer, node) for i, layer in enumerate(attentions)),)

    def _attention_row(self, layer: int, attention: torch.Tensor | None, node: int) -> torch.Tensor | None:
        """Row `node` of `(1, heads, width, keys)`, with the keys that plain decoding would have had in its cache."""
        if attention is None:
            return None
        if self._cached is None:
            return attention[self._row]
        path = self._draft.path(node)
        columns = self._columns()
        position = (self._cached if columns is None else len(columns)) + len(path) - 1
        window = self._windows[layer] if layer < len(self._windows) else None
        oldest = 0 if window is None else max(0, position - window + 1)
        first = self._cached + attention.shape[2] - attention.shape[3]
        row = attention[self._row, :, node : node + 1]
        if columns is None and isinstance(self._draft, Chain):
            return row[..., oldest - first : position + 1 - first]
        # The past, then the node's own branch, where the past ends after `cached - first` keys.
        past = range(self._cached - first) if columns is None else columns
        keys = [*past, *(self._cached - first + place for place in path)]
        return row[..., keys[oldest - first :]]


def result(recorders: Sequence[Recorder], sequences: torch.Tensor, cache: Any) -> Any:
    """What `generate` returns; entries behind the end of a row are zeros.

    Args:
        recorders: one a row.
        sequences: int64 `(rows, length)`.
        cache: the model's.
    """
    if not recorders[0].returns_dict:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_together([recorder.scores for recorder in recorders]),
        logits=_together([recorder.logits for recorder in recorders]),
        attentions=_together([recorder.attentions for recorder in recorders]),
        hidden_states=_together([recorder.hidden_states for recorder in recorders]),
        past_key_values=cache,
    )


def _together(rows: Sequence[tuple[Any, ...] | None]) -> tuple[Any, ...] | None:
    """The rows' entries for each token, joined; every entry is a tensor, or one for each layer."""
    if len(rows) == 1 or rows[0] is None:
        return rows[0]
    longest = max((row for row in rows if row is not None), key=len)
    entries = []
    for token, like in enumerate(longest):
        own = [row[token] if row is not None and token < len(row) else None for row in rows]
        if isinstance(like, tuple):
            layers = range(len(like))
            entries.append(tuple(_joined([None if e is None else e[i] for e in own], like[i]) for i in layers))
        else:
            entries.append(_joined(own, like))
    return tuple(entries)


def _joined(rows: Sequence[Any], like: Any) -> Any:
    return None if like is None else torch.cat([torch.zeros_like(like) if row is None else row for row in rows])

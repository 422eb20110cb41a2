"""Attention masks of our own: which of them a model takes, and how they are made."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Mask: TypeAlias = "torch.Tensor | dict[str, torch.Tensor]"


class Masks:
    """Additive masks for a model's layers.

    The additive form, 0 or the lowest number of the model's dtype, is the one that both of torch's attention (`sdpa`)
    and `eager` take; eager attention would add a mask of bools as zeros and ones.

    Args:
        model: one for which `why_no_masks` gives None.
        cache: its cache, holding the prompt.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        config = model.config.get_text_config()
        self._dtype = model.dtype
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if types is None:
            self._windows = {"": window}
        else:
            self._windows = {kind: window if kind == "sliding_attention" else None for kind in types}
        # Such layers hand out no more than what the oldest query can see.
        self._forgets = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)

    def make(
        self, valid: torch.Tensor, key_index: torch.Tensor, query_index: torch.Tensor, ancestors: torch.Tensor
    ) -> Mask:
        """The mask of a pass, or one for each kind of layer where the model has several kinds.

        Args:
            valid: bool `(rows, cached)`, the cache's slots that hold a token of the row's text.
            key_index: int64 `(rows, cached)`, the place of that token in the text.
            query_index: int64 `(rows, width)`, the place of each token of the pass.
            ancestors: bool `(rows, width, width)`, which tokens of the pass each of them follows, itself included.

        Returns:
            Float `(rows, 1, width, keys)`.
        """
        visible = torch.cat([valid[:, None, :].expand(-1, query_index.shape[1], -1), ancestors], dim=2)
        made = {window: self._additive(visible, None) for window in set(self._windows.values()) if window is None}
        for window in set(self._windows.values()) - {None}:
            assert window is not None
            distance = query_index[:, :, None] - torch.cat([key_index, query_index], dim=1)[:, None, :]
            kept = min(valid.shape[1], window - 1) if self._forgets else valid.shape[1]
            made[window] = self._additive(visible & (distance < window), kept + query_index.shape[1])
        if len(made) == 1:
            # A model with one kind of layer takes the mask as such, also where it would take a mapping.
            return next(iter(made.values()))
        return {kind: made[window] for kind, window in self._windows.items()}

    def _additive(self, visible: torch.Tensor, keys: int | None) -> torch.Tensor:
        if keys is not None:
            visible = visible[:, :, visible.shape[2] - keys :]
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(self._dtype).min)[:, None]


def why_no_masks(model: Any, cache: Any) -> str | None:
    """The reason why a model can't be given our masks, None when it can.

    Args:
        model: the target.
        cache: its cache.
    """
    config = model.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no mask of one's own; load the model with attn_implementation='sdpa'"
    name = type(model).__name__
    if not any(parent.__module__.startswith("transformers.models.") for parent in type(model).__mro__):
        return f"{name} is not a model of transformers, which would be known to take a mask as it is"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return f"{name} takes no position ids"
    if hasattr(getattr(model, "model", model), "rope_deltas") or hasattr(model, "rope_deltas"):
        return f"{name} counts positions in more than one dimension"
    if not set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}:
        return f"{name} has layers other than full and sliding-window attention"
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return f"{name} keeps more than keys and values in its cache"
    return None

"""Cache surgery: take back the entries of rejected draft tokens, whatever the version of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer

from freedraft.retrieval.errors import UnsupportedError


def prepare_cache(cache: Any, rows: int = 1) -> list[int | None]:
    """Make `cache` ready, before the prompt goes in, for entries to be taken back later.

    Before transformers 5 a sliding-window layer forgot at once what left the window, and could not be rolled back.
    Such layers are replaced, while still empty, by layers that keep everything; the attention mask does the sliding.
    So they are for several rows, in whose slots a window is not the same number of tokens for each.

    Args:
        cache: the model's cache.
        rows: sequences in it.

    Returns:
        For every layer that there is already, its sliding window in tokens, None = unbounded.

    Raises:
        UnsupportedError: a cache that can't be rolled back.
    """
    kind = _kind_that_cannot(cache)
    if kind is not None:
        raise UnsupportedError(
            f"{kind} can't take back rejected draft tokens; leave out cache_implementation and past_key_values, or "
            "give a DynamicCache that is not offloaded"
        )
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    for i, layer in enumerate(cache.layers):
        forgets = isinstance(layer, DynamicSlidingWindowLayer)
        if forgets and (rows > 1 or not hasattr(layer, "activate_past_recording")):
            if layer.get_seq_length() and rows > 1:
                raise UnsupportedError(
                    "past_key_values: a batch can't go on with a sliding-window cache that is in use; start from an "
                    "empty cache, or call generate for each prompt"
                )
            if layer.get_seq_length():
                raise UnsupportedError(
                    "past_key_values: this version of transformers can't roll back a sliding-window cache that is in "
                    "use; start from an empty cache, or use transformers 5"
                )
            cache.layers[i] = DynamicLayer()
    return windows


def _kind_that_cannot(cache: Any) -> str | None:
    """What kind of cache this is, if it is none to be rolled back; None if it may be one."""
    if not isinstance(cache, DynamicCache):
        return f"a cache of type {type(cache).__name__}"
    # transformers makes these two of the same class.
    if getattr(cache, "offloading", False):
        return "an offloaded cache"
    if any(isinstance(layer, QuantizedLayer) for layer in cache.layers):
        return "a quantised cache"
    return None


class Rollback:
    """Takes back the newest entries of a `DynamicCache` that holds the prompt.

    Raises:
        UnsupportedError: the model keeps a recurrent state, which can't be taken back.
    """

    def __init__(self, cache: Any) -> None:
        croppable = getattr(cache, "is_croppable", None)
        if croppable is None:
            croppable = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        if not croppable:
            raise UnsupportedError(
                "this model keeps a recurrent state (or a cache that can't be cropped), from which rejected draft "
                "tokens can't be taken back; use plain generate"
            )
        self._cache = cache
        # After the prompt, not before: a recording layer would keep all of a long prompt.
        self._recording = [layer for layer in cache.layers if getattr(layer, "record_past", None) is False]
        if self._recording:
            cache.activate_past_recording()
        # A layer that records must be cropped after every pass, if by nothing, to shed what left its window.
        self._always = any(hasattr(layer, "record_past") for layer in cache.layers)

    def drop(self, count: int) -> None:
        """Take back the newest `count` tokens; after every forward pass, also with 0."""
        # Before transformers 5, crop(0) meant "keep nothing".
        if count or self._always:
            self._cache.crop(-count)

    def release(self) -> None:
        """Leave the cache as a caller expects it."""
        for layer in self._recording:
            layer.record_past = False


def gather_newest(cache: Any, count: int, kept: Sequence[int]) -> None:
    """Move the entries `kept` of the newest `count` to their front, in that order; what follows them is left over.

    Args:
        cache: a `DynamicCache` with keys and values only; written in place.
        count: tokens of the last pass.
        kept: indices among these, rising.
    """
    if list(kept) == list(range(len(kept))):
        return
    for layer in cache.layers:
        chosen = torch.tensor(kept, device=layer.keys.device)
        for states in (layer.keys, layer.values):
            newest = states[:, :, states.shape[2] - count :]
            newest[:, :, : len(kept)] = newest.index_select(2, chosen)

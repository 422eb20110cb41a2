"""The target model and its cache: one forward pass over the prompt, then one for each draft."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import pad

from freedraft.integrations.hf.cache import Rollback, prepare_cache


class Target:
    """A model in the middle of `generate`, asked as `generate` itself asks it.

    The inputs of a pass are made by the model's own `prepare_inputs_for_generation`, so whatever a model adds to them
    is there.

    Attributes:
        cached: tokens in the cache.
        windows: for every layer the sliding window in tokens, None = unbounded.
    """

    def __init__(self, model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        self._model = model
        self._generation_config = generation_config
        self._kwargs = model_kwargs
        self.cached = 0
        self.windows = prepare_cache(model_kwargs["past_key_values"])
        self._rollback: Rollback | None = None
        self._prefilled = 0
        parameters = inspect.signature(model.prepare_inputs_for_generation).parameters
        # transformers 5 slices the newest tokens by count, 4 by their positions in the cache.
        self._by_count = "next_sequence_length" in parameters or not hasattr(model, "_get_initial_cache_position")

    @property
    def cache(self) -> Any:
        """The model's cache."""
        return self._kwargs["past_key_values"]

    def prefill(self, input_ids: torch.Tensor) -> Any:
        """Run the prompt int64 `(1, n)`; return the model's output, the logits of the last position being last."""
        model, kwargs = self._model, self._kwargs
        if hasattr(model, "_get_initial_cache_position"):
            kwargs = model._get_initial_cache_position(input_ids.shape[1], input_ids.device, kwargs)
        if hasattr(model, "_prefill"):
            outputs = model._prefill(input_ids, self._generation_config, kwargs)
        else:
            if self._generation_config.prefill_chunk_size is not None:
                kwargs = model._prefill_chunking(input_ids, self._generation_config, **kwargs)
            outputs = model(**model.prepare_inputs_for_generation(input_ids, **kwargs), return_dict=True)
        kwargs["past_key_values"] = outputs.past_key_values
        for once in ("inputs_embeds", "cache_position"):
            kwargs.pop(once, None)
        self._kwargs = kwargs
        self._rollback = Rollback(self.cache)
        self.cached = self._prefilled = self.cache.get_seq_length()
        return outputs

    def verify(self, ids: torch.Tensor, width: int) -> Any:
        """Run the last `width` tokens of `ids` int64 `(1, n)`, which the cache does not hold yet."""
        kwargs = dict(self._kwargs)
        offset = self.cached - self._prefilled
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs["attention_mask"] = pad(mask, (0, offset + width), value=1)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions[..., -1:] + torch.arange(
                offset + 1, offset + width + 1, device=positions.device
            )
        if (types := kwargs.get("token_type_ids")) is not None:
            kwargs["token_type_ids"] = types[:, -1:].expand(-1, width)
        if (types := kwargs.get("mm_token_type_ids")) is not None:
            kwargs["mm_token_type_ids"] = types.new_zeros((types.shape[0], width))
        if self._by_count:
            kwargs["next_sequence_length"] = width
        else:
            kwargs["cache_position"] = torch.arange(self.cached, self.cached + width, device=ids.device)
        inputs = self._model.prepare_inputs_for_generation(ids, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = width
        outputs = self._model(**inputs, return_dict=True)
        self.cached += width
        return outputs

    def drop(self, count: int) -> None:
        """Take the newest `count` tokens out of the cache; after every `verify`, also with 0."""
        assert self._rollback is not None
        self._rollback.drop(count)
        self.cached -= count

    def decoding(self) -> AbstractContextManager[Any]:
        """The context that `generate` runs the passes after the prompt in: it switches the kernels of experts."""
        enter = getattr(self._model, "_optimize_model_for_decode", None)
        return nullcontext() if enter is None else enter()

    def release(self) -> None:
        """Leave the cache as a caller expects it."""
        if self._rollback is not None:
            self._rollback.release()

"""The target model and its cache: one forward pass over the prompt, then one for each draft."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import pad

from freedraft.integrations.hf.cache import Rollback, gather_newest, prepare_cache
from freedraft.integrations.hf.draft import Draft, Tree
from freedraft.integrations.hf.masks import Masks, why_no_masks


class Target:
    """A model in the middle of `generate`, asked as `generate` itself asks it.

    The inputs of a pass are made by the model's own `prepare_inputs_for_generation`, so whatever a model adds to them
    is there.

    Attributes:
        cached: tokens in the cache.
        windows: for every layer the sliding window in tokens, None = unbounded.
        why_no_trees: the reason why only chains can be verified; None when trees can.
    """

    def __init__(self, model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        self._model = model
        self._generation_config = generation_config
        self._kwargs = model_kwargs
        self.cached = 0
        self.windows = prepare_cache(model_kwargs["past_key_values"])
        self.why_no_trees = why_no_masks(model, self.cache)
        self._rollback: Rollback | None = None
        self._masks: Masks | None = None
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

    def verify(self, ids: torch.Tensor, draft: Draft) -> Any:
        """Run the last committed token and `draft`, the last tokens of `ids` int64 `(1, n)`."""
        width = draft.width
        inputs = self._inputs(ids, width)
        if isinstance(draft, Tree):
            self._arrange(inputs, draft)
        outputs = self._model(**inputs, return_dict=True)
        self.cached += width
        return outputs

    def _inputs(self, ids: torch.Tensor, width: int) -> dict[str, Any]:
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
        return inputs

    def _arrange(self, inputs: dict[str, Any], tree: Tree) -> None:
        """Place the tokens of a chain's `inputs` as `tree` has them."""
        if self._masks is None:
            self._masks = Masks(self._model, self.cache)
        device = inputs["input_ids"].device
        depths = torch.tensor([tree.depths], device=device)
        slots = torch.arange(self.cached, device=device)[None]
        padding = inputs.get("attention_mask")
        valid = torch.ones_like(slots, dtype=torch.bool) if padding is None else padding[:, : self.cached].bool()
        ancestors = torch.from_numpy(tree.ancestors()).to(device)[None]
        inputs["attention_mask"] = self._masks.make(valid, slots, self.cached + depths, ancestors)
        positions = inputs.get("position_ids")
        inputs["position_ids"] = depths + (self.cached if positions is None else positions[:, :1])

    def keep(self, draft: Draft, node: int) -> None:
        """Leave of `draft` only the path to `node` in the cache, node 0 included; after every `verify`."""
        assert self._rollback is not None
        path = draft.path(node)
        if isinstance(draft, Tree):
            gather_newest(self.cache, draft.width, path)
        self._rollback.drop(draft.width - len(path))
        self.cached -= draft.width - len(path)

    def decoding(self) -> AbstractContextManager[Any]:
        """The context that `generate` runs the passes after the prompt in: it switches the kernels of experts."""
        enter = getattr(self._model, "_optimize_model_for_decode", None)
        return nullcontext() if enter is None else enter()

    def release(self) -> None:
        """Leave the cache as a caller expects it."""
        if self._rollback is not None:
            self._rollback.release()

"""The target model and its cache: one forward pass over the prompt, then one for each draft."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from freedraft.integrations.hf.cache import Rollback, gather_newest, prepare_cache
from freedraft.integrations.hf.draft import Draft, Tree
from freedraft.integrations.hf.masks import Masks, why_no_masks
from freedraft.integrations.hf.slots import Slots
from freedraft.integrations.hf.tokens import Tokens
from freedraft.retrieval.errors import UnsupportedError


class Target:
    """A model in the middle of `generate`, asked as `generate` itself asks it.

    The inputs of a pass are made by the model's own `prepare_inputs_for_generation`, so whatever a model adds to them
    is there. One sequence with a chain behind it is run as plain decoding would run it; a tree, or several sequences,
    with positions and masks of our own.

    Args:
        model: the model.
        generation_config: of the call.
        model_kwargs: of the call; not changed.
        rows: sequences.

    Attributes:
        cached: slots of the cache that are in use: with one sequence, its tokens.
        windows: for every layer the sliding window in tokens, None = unbounded.
        why_no_trees: the reason why only chains can be verified; None when trees can.
    """

    def __init__(self, model: Any, generation_config: Any, model_kwargs: dict[str, Any], rows: int = 1) -> None:
        self._model = model
        self._generation_config = generation_config
        self._kwargs = model_kwargs
        self.cached = 0
        self._rows = rows
        self.windows = prepare_cache(model_kwargs["past_key_values"], rows)
        self.why_no_trees = why_no_masks(model, self.cache)
        if rows > 1 and self.why_no_trees is not None:
            raise UnsupportedError(
                f"a batch of {rows} sequences: {self.why_no_trees}; or call generate for each prompt"
            )
        self._slots: Slots | None = None
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
        """Run the prompts int64 `(rows, n)`; return the model's output, the logits of the last position being last."""
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
        if self._rows > 1:
            self._slots = Slots(self.cache, kwargs.get("attention_mask"), self._rows)
        return outputs

    def verify(self, texts: Sequence[Tokens], drafts: Sequence[Draft]) -> Any:
        """Run, for each live sequence, its last committed token and its draft; shorter ones are padded behind.

        Returns:
            The model's output; `logits` `(rows, width, vocabulary)`, where width is that of the widest draft.
        """
        width = max(draft.width for draft in drafts)
        if self._slots is None:
            ids = texts[0].with_draft(drafts[0].tokens)
        else:
            pending = torch.cat([text.committed()[:, -1:] for text in texts])
            drafted = [[*draft.tokens, *[0] * (width - draft.width)] for draft in drafts]
            ids = torch.cat([pending, torch.tensor(drafted, dtype=torch.long, device=pending.device)], dim=1)
        inputs = self._inputs(ids, width)
        if self._slots is not None or isinstance(drafts[0], Tree):
            self._arrange(inputs, drafts, width)
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

    def _arrange(self, inputs: dict[str, Any], drafts: Sequence[Draft], width: int) -> None:
        """Place the tokens of `inputs`, which are made for chains in a cache without holes, as `drafts` have them."""
        if self._masks is None:
            self._masks = Masks(self._model, self.cache)
        device = inputs["input_ids"].device
        depths = torch.tensor([[*draft.depths, *[0] * (width - draft.width)] for draft in drafts], device=device)
        # What pads a short draft sees itself, and is seen by nothing else.
        marks = np.tile(np.eye(width, dtype=np.bool_), (len(drafts), 1, 1))
        for i, draft in enumerate(drafts):
            marks[i, : draft.width, : draft.width] = draft.ancestors()
        if (slots := self._slots) is not None:
            visible, places, lengths, holes = slots.visible, slots.places, slots.lengths, slots.holes[:, None]
        else:
            places = torch.arange(self.cached, device=device)[None]
            padding = inputs.get("attention_mask")
            visible = places >= 0 if padding is None else padding[:, : self.cached].bool()
            lengths, holes = torch.tensor([self.cached], device=device), 0
        queries = lengths[:, None] + depths
        inputs["attention_mask"] = self._masks.make(visible, places, queries, torch.from_numpy(marks).to(device))
        positions = inputs.get("position_ids")
        inputs["position_ids"] = queries if positions is None else positions[:, :1] - holes + depths

    def columns(self, row: int) -> list[int] | None:
        """The slots that hold the text of live sequence `row`, in order; None where that is all of them."""
        return None if self._slots is None else self._slots.columns(row)

    def keep(self, drafts: Sequence[Draft], nodes: Sequence[int]) -> None:
        """Leave of each draft only the path to its node, node 0 included, in the cache; after every `verify`."""
        assert self._rollback is not None
        width = max(draft.width for draft in drafts)
        paths = [draft.path(node) for draft, node in zip(drafts, nodes, strict=True)]
        if self._slots is not None:
            self._slots.keep(width, paths)
            self.cached = self.cache.get_seq_length()
            return
        if isinstance(drafts[0], Tree):
            gather_newest(self.cache, width, paths[0])
        self._rollback.drop(width - len(paths[0]))
        self.cached -= width - len(paths[0])

    def end(self, ended: Sequence[bool]) -> None:
        """Let go of sequences: one flag a live one. At least one must stay."""
        assert self._slots is not None
        self._slots.end(ended)
        staying = [i for i, over in enumerate(ended) if not over]
        for name in ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"):
            values = self._kwargs.get(name)
            if values is not None and values.shape[0] == len(ended):
                self._kwargs[name] = values[torch.tensor(staying, device=values.device)]

    def decoding(self) -> AbstractContextManager[Any]:
        """The context that `generate` runs the passes after the prompt in: it switches the kernels of experts."""
        enter = getattr(self._model, "_optimize_model_for_decode", None)
        return nullcontext() if enter is None else enter()

    def release(self) -> None:
        """Leave the cache as a caller expects it."""
        if self._slots is not None:
            self._slots.restore()
        if self._rollback is not None:
            self._rollback.release()

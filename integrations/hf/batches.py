"""What a batch shares in plain decoding, taken apart so that each row can be decoded as if it were alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteria
from transformers.generation import logits_process

from freedraft.retrieval.errors import InputError, UnsupportedError


def row_processors(processors: LogitsProcessorList, row: int, rows: int, model: Any) -> LogitsProcessorList:
    """The processors of row `row` of `rows`, each called with the one row only.

    Those of transformers that keep nothing of the text are shared, the others are given the row's part of what they
    keep. Anyone else's are copied, so that each row has one that sees its text and no other.

    Raises:
        UnsupportedError: a processor that can't be copied.
    """
    if rows == 1:
        return processors
    return LogitsProcessorList([_processor(processor, row, rows, model) for processor in processors])


def row_criteria(criteria: Sequence[StoppingCriteria], rows: int, model: Any) -> list[StoppingCriteria]:
    """The stopping criteria of one row of `rows`, likewise."""
    if rows == 1:
        return list(criteria)
    return [criterion if _transformers_own(criterion) else _copied(criterion, model) for criterion in criteria]


def pad_token(generation_config: Any, criteria: Sequence[StoppingCriteria], rows: int) -> int:
    """The token to fill up rows with that end early.

    Raises:
        InputError: there is none, and rows may end at different places.
    """
    # What `generate` has settled on comes first.
    for token in (getattr(generation_config, "_pad_token_tensor", None), generation_config.pad_token_id):
        if token is not None:
            return int(token)
    if rows > 1 and not all(type(criterion) is MaxLengthCriteria for criterion in criteria):
        raise InputError("rows of a batch may end early, and there is no pad_token_id to fill them up with: pass one")
    return 0


def padded(texts: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """Texts int64 `(1, length)` as one tensor, `padding` behind those that ended early."""
    longest = max(text.shape[1] for text in texts)
    return torch.cat([pad(text, (0, longest - text.shape[1]), value=padding) for text in texts])


def _processor(processor: Any, row: int, rows: int, model: Any) -> Any:
    if not _transformers_own(processor):
        return _copied(processor, model)
    if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return type(processor)(lambda _, ids: allowed(row, ids), processor._num_beams)
    if isinstance(processor, logits_process.EncoderRepetitionPenaltyLogitsProcessor):
        own = copy.copy(processor)
        own.encoder_input_ids = _part(processor.encoder_input_ids, row, rows)
        return own
    if isinstance(processor, logits_process.EncoderNoRepeatNGramLogitsProcessor):
        own = copy.copy(processor)
        own.batch_size = 1
        own.generated_ngrams = [processor.generated_ngrams[row * len(processor.generated_ngrams) // rows]]
        return own
    if isinstance(processor, logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor):
        own = copy.copy(processor)
        own.unconditional_context = {
            key: _part(value, row, rows) if isinstance(value, torch.Tensor) else value
            for key, value in processor.unconditional_context.items()
        }
        return own
    if isinstance(processor, logits_process.SynthIDTextWatermarkLogitsProcessor):
        return _copied(processor, model)
    return processor


def _part(values: torch.Tensor, row: int, rows: int) -> torch.Tensor:
    """Row `row` of `rows`, of a tensor with a row for each or for each prompt of several sequences."""
    place = row * values.shape[0] // rows
    return values[place : place + 1]


def _transformers_own(thing: Any) -> bool:
    return type(thing).__module__.startswith("transformers.")


def _copied(thing: Any, model: Any) -> Any:
    try:
        # Whatever it holds on to, not another model.
        return copy.deepcopy(thing, {id(model): model})
    except Exception as error:
        raise UnsupportedError(
            f"{type(thing).__name__} can't be copied for each row of the batch ({error}); call generate for each prompt"
        ) from error

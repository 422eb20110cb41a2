"""What `generate(..., reference=...)` takes: texts that the outputs are expected to resemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import Int32, as_tokens

Text = str | Sequence[int] | Any
"""A string, or token ids: a list, or a tensor or array of one dimension."""

Reference = Text | Sequence[Text]


def as_references(reference: Reference, rows: int, tokenizer: Any) -> list[Int32]:
    """Token ids, int32, for each of the rows: one text for all of them, or a list with a text a prompt.

    Args:
        reference: the text, or texts; None or empty ones are none.
        rows: sequences to decode, as many for each prompt as are to be returned.
        tokenizer: for strings.

    Raises:
        InputError: neither texts nor ids, a string without a tokenizer, or another number of texts than of prompts.
    """
    if not _is_list_of_texts(reference):
        return [_ids(reference, tokenizer)] * rows
    if not len(reference) or rows % len(reference):
        raise InputError(f"reference: expected one text, or one a prompt, got {len(reference)} for {rows} rows")
    texts = [_ids(text, tokenizer) for text in reference]
    return [text for text in texts for _ in range(rows // len(texts))]


def _is_list_of_texts(reference: Reference) -> bool:
    if not isinstance(reference, list | tuple):
        return getattr(reference, "ndim", 1) > 1
    return any(text is None or isinstance(text, str) or hasattr(text, "__len__") for text in reference)


def _ids(text: Text | None, tokenizer: Any) -> Int32:
    if text is None:
        return np.empty(0, np.int32)
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("reference: a string needs the model's tokenizer: Speculative(..., tokenizer=tokenizer)")
        text = tokenizer(text, add_special_tokens=False).input_ids
    return as_tokens(text.tolist() if hasattr(text, "tolist") else text, "reference")

"""Token ids from `.npy` files, read a part at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from freedraft.retrieval.ragged import MAX_TOKEN, Int32

PART_TOKENS = 1 << 22
"""Longer files become several documents."""


def read_tokens(stream: IO[bytes], vocabulary_size: int) -> Iterator[Int32]:
    """The ids of a one-dimensional integer array, int32, at most `PART_TOKENS` at a time.

    Raises:
        ValueError: not such a file, cut short, or an id out of the vocabulary; the message says which.
    """
    version = npy.read_magic(stream)  # type: ignore[no-untyped-call]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format, expected 1.0 or 2.0")
    read_header: Any = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"expected a one-dimensional array of integers, got {dtype} of shape {shape}")
    left = math.prod(shape)
    while left:
        size = min(left, PART_TOKENS) * dtype.itemsize
        content = stream.read(size)
        if len(content) < size:
            raise ValueError(f"the file ends early: {left - len(content) // dtype.itemsize} ids are missing")
        values = np.frombuffer(content, dtype)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= min(vocabulary_size, MAX_TOKEN + 1):
            raise ValueError(
                f"token id {low if low < 0 else high} is not one of the tokenizer's 0..{vocabulary_size - 1}: "
                "was another tokenizer used?"
            )
        yield values.astype(np.int32)
        left -= len(values)

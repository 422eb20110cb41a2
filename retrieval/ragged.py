"""Ragged batches: `values` and `offsets`, row i being `values[offsets[i]:offsets[i + 1]]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freedraft.retrieval.errors import InputError

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]

MAX_TOKEN = 2**31 - 1


def as_tokens(values: Any, name: str = "tokens") -> Int32:
    """Return `values` as a contiguous int32 vector of token ids, without a copy where it is one already.

    The ids themselves are checked only where a cast could change them: a negative int32 passes here, and the
    kernels refuse it.

    Raises:
        InputError: not one-dimensional, not integers, or an id that int32 can't hold.
    """
    array = np.asarray(values)
    if array.dtype != np.int32:
        if array.size == 0:
            array = array.astype(np.int32)
        elif array.dtype.kind not in "iu":
            raise InputError(f"{name}: expected integer token ids, got dtype {array.dtype}")
        else:
            low, high = int(array.min()), int(array.max())
            if low < 0 or high > MAX_TOKEN:
                raise InputError(f"{name}: token ids must be in 0..{MAX_TOKEN}, got {low if low < 0 else high}")
            array = array.astype(np.int32)
    if array.ndim != 1:
        raise InputError(f"{name}: expected one dimension, got shape {array.shape}")
    return np.ascontiguousarray(array)


def as_slots(values: Any) -> Int64:
    """Return `values` as a contiguous int64 vector of slots, without a copy where it is one already.

    Raises:
        InputError: not one-dimensional, or not integers.
    """
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InputError(f"slots: expected integers of shape (n,), got {array.dtype} {array.shape}")
    return np.ascontiguousarray(array, np.int64)


def as_offsets(offsets: Any, total: int, rows: int | None = None) -> Int64:
    """Return `offsets` as contiguous int64 `(rows + 1,)`, checked to rise from 0 to `total`.

    Raises:
        InputError: wrong shape or type, a first entry other than 0, a falling entry, or a last entry that is
            not `total`.
    """
    array = np.asarray(offsets)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise InputError(f"offsets: expected integers of shape (rows + 1,), got {array.dtype} {array.shape}")
    array = np.ascontiguousarray(array, dtype=np.int64)
    if rows is not None and array.size != rows + 1:
        raise InputError(f"offsets: expected {rows + 1} entries for {rows} rows, got {array.size}")
    if array[0] != 0 or array[-1] != total or (array.size > 2 and bool((array[1:] < array[:-1]).any())):
        raise InputError(f"offsets: expected to rise from 0 to {total}, got {_shown(array)}")
    return array


def ragged(rows: Sequence[Any]) -> tuple[Int32, Int64]:
    """Pack a list of token sequences into `values` int32 and `offsets` int64; for callers at the edge and tests."""
    arrays = [as_tokens(row, f"row {i}") for i, row in enumerate(rows)]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return values, offsets


def _shown(array: Int64) -> str:
    return str(array.tolist() if array.size <= 8 else [*array[:4].tolist(), "...", *array[-3:].tolist()])

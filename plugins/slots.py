"""Slots: small numbers that name open sequences, for drafters that keep arrays with a row a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import Int32, Int64, as_tokens

FIRST = 16


class Slots:
    """Hands out the lowest free numbers, and knows which are in use.

    Attributes:
        capacity: numbers that there are; no slot is this or higher.
    """

    def __init__(self) -> None:
        self._open: NDArray[np.bool_] = np.zeros(FIRST, np.bool_)

    @property
    def capacity(self) -> int:
        """How many rows the arrays of the slots need."""
        return len(self._open)

    def take(self, count: int) -> Int64:
        """Return `count` free slots, int64, open from now on; `capacity` may have grown."""
        while len(self._open) - np.count_nonzero(self._open) < count:
            self._open = np.concatenate([self._open, np.zeros(len(self._open), np.bool_)])
        slots: Int64 = np.flatnonzero(~self._open)[:count].astype(np.int64)
        self._open[slots] = True
        return slots

    def checked(self, slots: Any) -> Int64:
        """Return `slots` as int64, all of them open.

        Raises:
            InputError: one that is not.
        """
        array: Int64 = np.asarray(slots, np.int64)
        if len(array) and (array.min() < 0 or array.max() >= len(self._open) or not self._open[array].all()):
            raise InputError(f"slots: expected open ones, got {slots}")
        return array

    def release(self, slots: Any) -> None:
        """Free slots for the next `take`.

        Raises:
            InputError: one that is not open, or named twice; nothing is freed then.
        """
        array = self.checked(slots)
        if len(np.unique(array)) != len(array):
            raise InputError(f"slots: the same one twice in {slots}")
        self._open[array] = False


def grown(array: NDArray[Any], rows: int, fill: int = 0) -> Any:
    """`array` with at least `rows` rows, the new ones filled with `fill`; itself where it has them already."""
    if len(array) >= rows:
        return array
    larger = np.full((rows, *array.shape[1:]), fill, array.dtype)
    larger[: len(array)] = array
    return larger


def check_one_each(name: str, count: int, slots: Int64) -> None:
    """Check that there are as many of something, called `name`, as slots.

    Raises:
        InputError: there are not.
    """
    if count != len(slots):
        raise InputError(f"{name}: expected {len(slots)}, one a slot, got {count}")


def checked_tokens(values: Any, name: str = "tokens") -> Int32:
    """Return `values` as int32 token ids.

    Raises:
        InputError: as `as_tokens`, and a negative id.
    """
    tokens = as_tokens(values, name)
    if len(tokens) and tokens.min() < 0:
        raise InputError(f"{name}: token ids must not be negative, got {int(tokens.min())}")
    return tokens

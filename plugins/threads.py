"""Sharing the rows of a batch among threads: kernels let go of Python's lock, so they run side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

LEAST_ROWS = 32
"""Fewer rows than this are done sooner than another thread has woken up."""


class Threads:
    """`count` threads, the caller's among them; the others start when they are first needed."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count - 1, "freedraft") if count > 1 else None

    def share(self, rows: int, work: Callable[[int, int], T]) -> list[T]:
        """Call `work(first, last)` for parts that make up `range(rows)`; the results in the order of the rows.

        Raises:
            What `work` raises, when all parts have ended.
        """
        parts = max(1, min(self._count, rows // LEAST_ROWS))
        bounds = [rows * i // parts for i in range(parts + 1)]
        if self._pool is None or parts == 1:
            return [work(0, rows)]
        others = [self._pool.submit(work, *pair) for pair in pairwise(bounds[1:])]
        try:
            first = work(0, bounds[1])
        finally:
            done = [other.exception() for other in others]
        for error in done:
            if error is not None:
                raise error
        return [first, *(other.result() for other in others)]

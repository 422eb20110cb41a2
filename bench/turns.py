"""Pieces of work that take turns in one thread, each with a clock that stands still while the others have theirs.

A shared machine changes its speed from second to second. What alternates every few milliseconds meets the same changes,
so that a ratio of two of them is far steadier than that of two runs one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, TypeVar

from greenlet import greenlet

Result = TypeVar("Result")


class Turns:
    """Lets pieces of work alternate; each calls `pass_on` where the next one may go on.

    Attributes:
        name: of the piece that has its turn, empty outside of `run`.
    """

    def __init__(self) -> None:
        self.name = ""
        self._away: dict[str, float] = {}
        self._hub: Any = None

    def run(self, work: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
        """Call all of `work`, in turns; returns what each returned. What one raises ends all."""
        self._hub = greenlet.getcurrent()
        running = {name: greenlet(call) for name, call in work.items()}
        left = dict.fromkeys(work, perf_counter())
        self._away = dict.fromkeys(work, 0.0)
        results: dict[str, Result] = {}
        try:
            while running:
                for name, piece in list(running.items()):
                    self.name = name
                    self._away[name] += perf_counter() - left[name]
                    result = piece.switch()
                    left[name] = perf_counter()
                    if piece.dead:
                        results[name] = result
                        del running[name]
        finally:
            self.name = ""
        return results

    def pass_on(self) -> None:
        """Let the others have their turns; nothing outside of `run`."""
        if self.name:
            self._hub.switch()

    def clock(self) -> float:
        """Seconds, those left out that others had; outside of `run` like `perf_counter`."""
        return perf_counter() - self._away.get(self.name, 0.0)

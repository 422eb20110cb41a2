"""Work that is done every now and then while an engine runs, from a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from freedraft.plugins.background import start_thread

logger = logging.getLogger("freedraft")


class Periodic:
    """Calls `work` at an interval, one call at a time.

    The thread does not keep a process from ending, nor what `work` is a part of from being collected.

    Args:
        interval: seconds; 0 = never, but for `now`.
        work: what to do; it may raise nothing.
        name: of the thread.
        last: done once, at the end; the thread calls `work` no more behind it. It may raise nothing, either.
    """

    def __init__(
        self, interval: float, work: Callable[[], None], name: str, last: Callable[[], None] | None = None
    ) -> None:
        self._interval = interval
        self._work = work
        self._last = last
        self._ending = threading.Event()
        self._ended = False
        self._lock = threading.Lock()
        self._thread = start_thread(self._run, name, self._failed) if interval > 0 else None

    def now(self) -> None:
        """Call it now."""
        with self._lock:
            self._work()

    def end(self) -> None:
        """Stop, and do what is to be done last."""
        self._ending.set()
        # What ends this can be collected as garbage in any thread: in this one it may be at work, and ends behind it.
        if threading.current_thread() is not self._thread:
            self._end()

    def _run(self) -> None:
        while not self._ending.wait(self._interval):
            with self._lock:
                if not self._ended:
                    self._work()
        self._end()

    def _end(self) -> None:
        with self._lock:
            last, self._last, self._ended = self._last, None, True
            if last is not None:
                last()

    def _failed(self, error: Exception) -> None:
        logger.warning("freedraft: no thread for what is written at an interval: %s", error)

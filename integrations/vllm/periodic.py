"""Work that is done every now and then while an engine runs, from a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Periodic:
    """Calls `work` at an interval, and never while another call of it is running.

    The thread is a daemon: it does not keep a process from ending, and is not waited for then.

    Args:
        interval: seconds; 0 = never, but for `now`.
        work: what to do; it may raise nothing.
        name: of the thread.
    """

    def __init__(self, interval: float, work: Callable[[], None], name: str) -> None:
        self._interval = interval
        self._work = work
        self._ended = threading.Event()
        self._lock = threading.Lock()
        if interval > 0:
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def now(self) -> None:
        """Call it now."""
        with self._lock:
            self._work()

    def end(self) -> None:
        """Stop the thread."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self.now()

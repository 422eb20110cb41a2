"""Work beside drafting: in a thread of its own, and at the normal end of a process, whoever started it."""

from __future__ import annotations

import multiprocessing.util
import threading
from collections.abc import Callable


def start_thread(run: Callable[[], None], name: str, failed: Callable[[Exception], None]) -> threading.Thread | None:
    """A thread that does not keep the process alive; None where the system gives no more, which `failed` is told."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        failed(error)
        return None
    return thread


def at_exit(close: Callable[[], None], owner: object = None) -> multiprocessing.util.Finalize[None]:
    """Have `close` called at the normal end of the process, and before that when `owner` is gone, if one is given.

    Not so in a forked child: it has to ask for itself.
    """
    # The children of `multiprocessing`, as vLLM's engine is one, call this but not `atexit`'s.
    return multiprocessing.util.Finalize(owner, close, exitpriority=10)

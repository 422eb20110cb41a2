"""What is still to be done at the normal end of a process, whoever started it."""

from __future__ import annotations

import multiprocessing.util
from collections.abc import Callable


def at_exit(close: Callable[[], None], owner: object = None) -> multiprocessing.util.Finalize[None]:
    """Have `close` called at the normal end of the process, and before that when `owner` is gone, if one is given.

    Not so in a forked child: it has to ask for itself.
    """
    # The children of `multiprocessing`, as vLLM's engine is one, call this but not `atexit`'s.
    return multiprocessing.util.Finalize(owner, close, exitpriority=10)

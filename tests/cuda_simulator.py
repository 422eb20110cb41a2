"""Numba's CUDA simulator: it must be chosen before numba.cuda is imported, so tests run themselves again in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from time import sleep

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
"""Whether this process has it."""


def give_way() -> None:
    """Let the simulator's threads run while it waits for them.

    It asks each again and again whether it is alive. Meanwhile another gets its turn only every 5 ms, and a batch has
    thousands of turns.
    """
    from numba.cuda.simulator.kernel import BlockThread

    def is_alive(thread: Thread) -> bool:
        sleep(0)
        return Thread.is_alive(thread)

    BlockThread.is_alive = is_alive


def assert_passes_simulated(file: str, *options: str, jit: bool = False) -> None:
    """Run the tests of a file in another process, under the simulator.

    Args:
        options: more of pytest's.
        jit: compile what runs on the CPU; it pays where that is much.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "0" if jit else "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout

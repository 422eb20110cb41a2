"""The check that bench/gpu.py makes on a GPU before it times anything, under Numba's simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.py"


def run(*options, simulator="1"):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": simulator, "NUMBA_DISABLE_JIT": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True)


def test_the_kernels_pass_the_check():
    ran = run("--check-only")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "17 batches: the GPU's drafts, probabilities and counts equal the CPU's" in ran.stdout


def test_the_simulator_is_not_timed():
    ran = run()
    assert ran.returncode == 2
    assert "the simulator's times mean nothing" in ran.stderr

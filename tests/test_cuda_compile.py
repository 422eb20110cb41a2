"""The CUDA kernels compile for a real device, of which there need be none: NVIDIA's compiler makes PTX of them.

The simulator, which the other tests use, runs them as Python; what only a compiler refuses shows here.
"""

from __future__ import annotations

import os
import subprocess
import sys

import hopper
import pytest
from cuda_simulator import SIMULATED


@pytest.fixture(scope="module")
def compiled():
    if SIMULATED:
        pytest.skip("the simulator compiles nothing")
    pytest.importorskip("numba.cuda", reason="needs numba-cuda")
    with hopper.compiler() as compile_kernel:
        yield compile_kernel


def types_of(text):
    """`i4[2]` is an int32 array of two axes, `i8` an int64."""
    from numba import types

    kinds = {"i4": types.int32, "i8": types.int64, "f4": types.float32}
    found = []
    for word in text.split():
        kind, _, axes = word.partition("[")
        found.append(types.Array(kinds[kind], int(axes[:-1]), "C") if axes else kinds[kind])
    return found


INPUTS = "i4[2] i4[1] i8[1] i4[1]"
OUTPUTS = "i8[2] f4[2] i4[1]"


def test_the_scan(compiled):
    from freedraft.retrieval.cuda import on_gpu

    types = types_of(f"{INPUTS} i8 i8 i8 f4 i8[3] i4[1] {OUTPUTS}")
    assert ".target sm_90" in compiled(on_gpu.scan_kernel(on_gpu.MOST_THREADS), *types)


def test_drafting_from_an_index_with_the_functions_of_the_cpu(compiled):
    from freedraft.retrieval.cuda import corpus_on_gpu

    automaton = "i4[1] i4[2] i4[2]"
    types = types_of(f"{automaton} i4[2] i4[2] {INPUTS} i8 i8 f4 i4[2] f4[2] {OUTPUTS}")
    assert ".target sm_90" in compiled(corpus_on_gpu.corpus_kernel, *types)


def test_importing_them_asks_for_no_device():
    code = "from freedraft.retrieval.cuda import corpus_on_gpu, on_gpu"
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)

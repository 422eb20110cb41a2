"""Arrays that kernels borrow: the same memory, no counts, and nothing freed too soon or never."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import pytest
from numba.core.runtime import _nrt_python as _nrt
from numba.core.runtime import rtsys

from freedraft import integrations, plugins, retrieval
from freedraft.plugins.fusion import Fusion, FusionSettings
from freedraft.retrieval.borrowing import borrowed, hold
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import ragged


class Pair(NamedTuple):
    numbers: np.ndarray
    marks: np.ndarray


@kernel
def write(pair, nested, step):
    pair, nested, step = borrowed((pair, nested, step))
    for one in nested:
        one.numbers[:] += pair.numbers[step:]
        one.marks[step] = 1
    return step


@kernel
def sum_of_squares(count, size):
    """Uses what it made for as long as it can, while more is allocated and freed."""
    total = 0
    for turn in range(count):
        made = (np.full(size, turn), Pair(np.full(size, turn + 1), np.zeros(1)))
        ours, pair = borrowed(made)
        for _ in range(3):
            other = np.full(size, -7)
            total += other[0] + 7
        for i in range(size):
            total += ours[i] * ours[i]
            total += pair.numbers[i] - turn - 1
        hold(made)
    return total


def arrays():
    return (
        Pair(np.arange(6), np.zeros(3)),
        (Pair(np.zeros(5, np.int64), np.zeros(3)), Pair(np.ones(5, np.int64), np.zeros(3))),
    )


def test_what_is_borrowed_is_the_same_memory():
    pair, nested = arrays()
    assert write(pair, nested, 1) == 1
    assert nested[0].numbers.tolist() == [1, 2, 3, 4, 5]
    assert nested[1].numbers.tolist() == [2, 3, 4, 5, 6]
    assert [one.marks.tolist() for one in nested] == [[0, 1, 0], [0, 1, 0]]


def test_kernels_run_as_python_too():
    script = "import test_borrowing as t; t.test_what_is_borrowed_is_the_same_memory(); print(t.sum_of_squares(5, 3))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert ran.stdout.split() == ["90"], ran.stderr


def test_references_are_as_many_as_before():
    pair, nested = arrays()
    before = [sys.getrefcount(array) for one in (pair, *nested) for array in one]
    write(pair, nested, 1)
    assert [sys.getrefcount(array) for one in (pair, *nested) for array in one] == before


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="Python frees what it makes by itself")
def test_what_a_kernel_makes_lives_until_it_lets_go_and_no_longer():
    # What was freed too soon would be given to the next array of that size, and overwritten.
    assert sum_of_squares(100, 5000) == 5000 * sum(turn * turn for turn in range(100))
    assert left_over(lambda: sum_of_squares(100, 5000)) == 0


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="Python frees what it makes by itself")
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_fusion_leaves_nothing_behind(shape):
    made = Fusion(FusionSettings(memory=2**24, shape=shape))
    slots = made.open(*ragged([[1, 2, 3, 1, 2]]))
    budget = np.array([8], np.int32)

    def step(slots):
        made.draft(slots, budget)
        made.extend(slots, *ragged([[3, 1]]))

    step(slots)
    assert left_over(lambda: step(slots)) == 0

    def fail():
        with pytest.raises(InputError):
            step(slots + 1)

    assert left_over(fail) == 0


def test_no_kernel_that_borrows_has_anything_that_numba_inlines():
    """Numba would then drop writes to what is borrowed."""
    found = 0
    inlined = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.FunctionDef)
    for room in (plugins, retrieval, integrations):
        for path in Path(room.__path__[0]).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and "borrowed" in {
                    name.id for name in ast.walk(node) if isinstance(name, ast.Name)
                }:
                    found += 1
                    assert not any(isinstance(inner, inlined) for inner in ast.walk(node) if inner is not node), path
    assert found >= 5


def left_over(call):
    """Arrays that a second call makes in kernels and does not free."""
    call()
    were_on = _nrt.memsys_stats_enabled()
    _nrt.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        call()
        after = rtsys.get_allocation_stats()
    finally:
        if not were_on:
            _nrt.memsys_disable_stats()
    assert after.alloc > before.alloc
    return (after.alloc - before.alloc) - (after.free - before.free)

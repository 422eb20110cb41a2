"""Arrays that are lent to kernels for good: the same memory, held as long as the loan, and not longer."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import weakref
from typing import NamedTuple

import numba
import numpy as np
import pytest

from freedraft.plugins.fusion import Fusion, FusionSettings
from freedraft.retrieval.borrowing import borrowed
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.lending import Lent
from freedraft.retrieval.ragged import ragged


class Pair(NamedTuple):
    numbers: np.ndarray
    marks: np.ndarray


@kernel
def lend(arrays):
    return Lent(arrays)


@kernel
def count_up(lent, by):
    pair, alone = borrowed(lent.arrays)
    pair.numbers[:] += by
    pair.marks[1] = 7
    alone[0] += 1
    return pair.numbers.sum()


def test_a_kernel_works_on_the_arrays_themselves():
    pair, alone = Pair(np.arange(4), np.zeros(3, np.int32)), np.zeros(1, np.int32)
    lent = lend((pair, alone))
    assert count_up(lent, 10) == 46
    assert count_up(lent, 1) == 50
    assert pair.numbers.tolist() == [11, 12, 13, 14]
    assert pair.marks.tolist() == [0, 7, 0]
    assert alone.tolist() == [2]


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="Python holds what it uses by itself")
def test_arrays_live_as_long_as_the_loan():
    pair, alone = Pair(np.arange(1000), np.zeros(3, np.int32)), np.zeros(1, np.int32)
    gone = weakref.ref(pair.numbers)
    lent = lend((pair, alone))
    del pair
    assert gone() is not None
    assert count_up(lent, 0) == 499500
    del lent
    assert gone() is None


def test_a_loan_is_neither_copied_nor_pickled():
    lent = lend((np.arange(3),))
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            action(lent)


@pytest.mark.parametrize(
    "part", ["_corpora", "_places", "_judged", "_taken_in", "_successors", "_table", "_rankings", "mixer"]
)
def test_each_part_of_fusion_that_is_replaced_is_lent_anew(part):
    drafter = Fusion(FusionSettings())
    drafter.open(*ragged([[1, 2, 1]]))
    before = drafter._arrays()
    assert drafter._arrays() is before
    setattr(drafter, part, copy.deepcopy(getattr(drafter, part)))
    assert drafter._arrays() is not before


def test_what_fusion_replaces_is_lent_anew():
    """More sequences, another predictor: kernels work on the new arrays, not on those they were lent before."""
    drafter = Fusion(FusionSettings())
    text = np.array([5, 6, 7, 8] * 6, np.int32)
    first = drafter.open(*ragged([text]))
    assert drafter.draft(first, np.array([4], np.int32)).tokens.tolist() == [5, 6, 7, 8]
    many = drafter.open(*ragged([text + 10 * i for i in range(1, 40)]))
    drafts = drafter.draft(np.concatenate([first, many]), np.full(40, 2, np.int32))
    assert drafts.tokens.tolist() == [token for i in range(40) for token in (5 + 10 * i, 6 + 10 * i)]
    learnt = Fusion(FusionSettings()).mixer
    drafter.mixer = learnt
    drafter.extend(first, *ragged([[5]]))
    assert learnt.observed.sum() > 0


def test_without_compiling_it_only_holds_them():
    code = "from freedraft.retrieval.lending import Lent; print(Lent((1, [2])).arrays)"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "(1, [2])\n"

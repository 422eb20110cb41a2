"""Compiling CUDA kernels for a Hopper GPU where there need be none: NVIDIA's compiler makes PTX of them."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

HOPPER = (9, 0)


@contextmanager
def compiler():
    """A function that compiles a kernel for the types that the runtime gives it, and returns its PTX."""
    from numba import cuda
    from numba.cuda import dispatcher

    with pytest.MonkeyPatch.context() as patch:
        # Functions that kernels call are compiled for the current device.
        patch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=HOPPER))

        def compile_kernel(kernel, *types):
            ptx, returned = cuda.compile_ptx(kernel.py_func, types, cc=HOPPER, device=False)
            assert str(returned) == "none"
            return ptx

        yield compile_kernel

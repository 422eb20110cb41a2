"""The one set of Numba options that every CPU kernel is compiled with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` to machine code at its first call, and keep the result on disk.

    `nogil`, so that a runtime's other threads go on; `error_model="numpy"`, so that a division needs no branch for
    zero; no `fastmath`, so that equal inputs give equal drafts on every machine; `forceinline`, for an array is passed
    on as seven words or more, and a call with ten of them takes longer than most of what is called (kernels of a GPU
    that call these are compiled with it as well). Kernels raise nothing: their public callers validate.
    """
    compiled: F = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)(function)
    return compiled

"""The one set of Numba options that every CPU kernel is compiled with, and arrays whose references are not counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numba
from numba.core import cgutils, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def kernel(function: F) -> F:
    """Compile `function` to machine code at its first call, and keep the result on disk.

    `nogil`, so that a runtime's other threads go on; `error_model="numpy"`, so that a division needs no branch for
    zero; no `fastmath`, so that equal inputs give equal drafts on every machine; `forceinline`, for an array is passed
    on as seven words or more, and a call with ten of them takes longer than most of what is called. Kernels raise
    nothing: their public callers validate.
    """
    compiled: F = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)(function)
    return compiled


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The machine code for arrays of this type, or tuples of them, that nobody is said to own."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value=value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        for i, part in enumerate(kind):
            stripped = _without_owner(context, builder, part, builder.extract_value(value, i))
            value = builder.insert_value(value, stripped, i)
    return value


def _borrowed(_: Any, arrays: Any) -> Any:
    return arrays(arrays), lambda context, builder, __, values: _without_owner(context, builder, arrays, values[0])


def _hold(_: Any, arrays: Any) -> Any:
    return types.void(arrays), lambda context, *__: context.get_dummy_value()


class _Borrowed(Protocol):
    def __call__(self, arrays: T, /) -> T: ...


class _Hold(Protocol):
    def __call__(self, arrays: object, /) -> None: ...


# Not by `overload`: where one of these is inlined, Numba drops writes to arrays that come from a call and are not read
# again. In Python there is nothing to do.
borrowed: _Borrowed = (lambda arrays: arrays) if numba.config.DISABLE_JIT else intrinsic(_borrowed)
"""In a kernel: the same arrays, tuples of them, and other values, but no references to the arrays are counted.

Numba counts them, atomically, wherever an array gets another name, as in every kernel that is called with it; where
there are some tens of arrays that takes several times as long as the work itself. Valid as long as someone holds the
originals: the caller of the outermost kernel does, of its arguments; `hold` does, of what a kernel makes. A kernel that
Python calls must not return what is borrowed.
"""

hold: _Hold = (lambda arrays: None) if numba.config.DISABLE_JIT else intrinsic(_hold)
"""In a kernel, behind the last use of what is borrowed: until here the originals are held."""

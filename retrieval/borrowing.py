"""Arrays that kernels borrow: no references to them are counted.

Numba counts references, atomically, wherever an array gets another name, as in every kernel that is called with it.
Where there are some tens of arrays, that takes several times as long as the work itself.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numba
from numba.core import cgutils, types
from numba.extending import intrinsic

T = TypeVar("T")


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
    # Of anything else a reference is counted, if there are any.
    context.nrt.incref(builder, kind, value)
    return value


def _borrowed(_: Any, arrays: Any) -> Any:
    return arrays(arrays), lambda context, builder, __, values: _without_owner(context, builder, arrays, values[0])


def _hold(_: Any, arrays: Any) -> Any:
    return types.void(arrays), lambda context, *__: context.get_dummy_value()


class _Borrowed(Protocol):
    def __call__(self, arrays: T, /) -> T: ...


class _Hold(Protocol):
    def __call__(self, arrays: object, /) -> None: ...


# Not by `overload`, which would be inlined; see there. In Python there is nothing to do.
borrowed: _Borrowed = (lambda arrays: arrays) if numba.config.DISABLE_JIT else intrinsic(_borrowed)
"""In a kernel: the same arrays, tuples of them, and numbers, but no references to the arrays are counted.

Valid as long as someone holds the originals: the caller of the outermost kernel does, of its arguments; `hold` does, of
what a kernel makes. A kernel that Python calls must not return what is borrowed, and one that borrows must have nothing
in it that Numba inlines by itself: no comprehension, no function within. Then Numba drops writes to arrays that come
from a call and are not read again.
"""

hold: _Hold = (lambda arrays: None) if numba.config.DISABLE_JIT else intrinsic(_hold)
"""In a kernel, behind the last use of what is borrowed: until here the originals are held."""

"""Arrays that are lent to kernels for good, and not handed to them anew at each call.

Numba looks at the type of every array that a kernel is called with, and where it is: for some forty arrays that takes
17 us, and 100 us where a forward pass has emptied the caches since. What is lent is looked at once.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

import numba
from numba.core import types
from numba.experimental import structref

from freedraft.retrieval.jit import kernel

T = TypeVar("T")


class Lent(Generic[T]):
    """What `lend` gives; it holds the arrays as long as it is there.

    Attributes:
        arrays: the arrays, for kernels alone.
    """

    arrays: T


class _InPython(Lent[T]):
    def __init__(self, arrays: T) -> None:
        self.arrays = arrays


@structref.register
class _LentType(types.StructRef):
    """Numba's type of it."""


class _Compiled(structref.StructRefProxy):
    """Python's side of it, which only holds it."""

    def __reduce__(self) -> Any:
        raise TypeError("what has lent arrays to kernels can be neither copied nor pickled")


structref.define_proxy(_Compiled, _LentType, ["arrays"])


@kernel
def _lend(arrays: Any) -> Any:
    return _Compiled(arrays)


def lend(arrays: T) -> Lent[T]:
    """Lend arrays, in named tuples and others of any depth. As dear as a call with them.

    They are these arrays, not what a name may mean later: lend anew what is replaced by another array.
    """
    if numba.config.DISABLE_JIT:
        return _InPython(arrays)
    return cast(Lent[T], _lend(arrays))

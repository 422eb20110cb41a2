"""Arrays that are lent to kernels for good, and not handed to them anew at each call.

Numba looks at the type of every array that a kernel is called with, and where it is: for some forty arrays that takes
17 us, and 100 us where a forward pass has emptied the caches since. What is lent is looked at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numba
from numba.core import types
from numba.experimental import structref

T = TypeVar("T")

if TYPE_CHECKING or numba.config.DISABLE_JIT:

    class Lent(Generic[T]):
        """Arrays, in named tuples and others of any depth, that kernels are lent; it holds them as long as it is there.

        They are these arrays, not what a name may mean later: lend anew what is replaced by another array. Made by a
        kernel of the module that lends: Numba's cache on disk names the types that a kernel was compiled for, and can't
        be read where one of them is missing, so one for all would tie them together.

        Attributes:
            arrays: the arrays, for kernels alone.
        """

        def __init__(self, arrays: T) -> None:
            self.arrays = arrays

else:

    @structref.register
    class _LentType(types.StructRef):
        """Numba's type of it."""

    class Lent(structref.StructRefProxy):
        """As above, compiled: Python only holds it."""

        def __reduce__(self) -> Any:
            raise TypeError("what has lent arrays to kernels can be neither copied nor pickled")

    structref.define_proxy(Lent, _LentType, ["arrays"])

"""Launching a kernel again and again for the price of one driver call.

Numba looks at every argument of every launch anew, which takes the host longer than the device takes for the work. Here
the arguments are laid out once, as Numba's own launches lay them out, and a launch changes those that are new and calls
the driver. It relies on how numba-cuda keeps a compiled kernel, and is not used with versions of which that
is not known.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
from numba import config, from_dtype, types

from freedraft.retrieval.errors import FreedraftError

logger = logging.getLogger("freedraft")

KNOWN = {("0", "30")}
"""Versions of numba-cuda whose layout of arguments the tests hold this one against."""

WORD = 8
DATA = 4  # the word of an array that is its address


class LaunchError(FreedraftError):
    """The driver refused a launch."""


class PreparedLaunch:
    """A kernel, the arguments that it was last launched with, and the driver's function to launch it.

    Not for two threads at once.
    """

    def __init__(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        """Compile the kernel for these arguments and lay them out.

        Args:
            kernel: what `cuda.jit` made of a function.
            arguments: arrays on the device, C-contiguous; ints (int64 to the kernel) and float32 scalars.

        Raises:
            AttributeError, ImportError, TypeError: numba-cuda or cuda-python is not as it was.
        """
        driver: Any = import_module("cuda.bindings.driver")
        compiled = kernel.compile(tuple(type_of(argument) for argument in arguments))
        compiled.bind()
        self._kept = compiled, arguments
        self._function = driver.CUfunction(int(compiled._codelibrary.get_cufunc().handle))
        self._launch = driver.cuLaunchKernel
        names = kernel.py_func.__code__.co_varnames
        laid_out: list[bytes] = []
        self._at: dict[str, int] = {}
        for name, argument in zip(names, arguments, strict=False):
            parts = words(argument)
            self._at[name] = len(laid_out) + (DATA if len(parts) > 1 else 0)
            laid_out += parts
        self._words = (ctypes.c_int64 * len(laid_out)).from_buffer_copy(b"".join(laid_out))
        begin = ctypes.addressof(self._words)
        self._pointers = (ctypes.c_void_p * len(laid_out))(*range(begin, begin + WORD * len(laid_out), WORD))
        self._parameters = ctypes.addressof(self._pointers)

    def change(self, name: str, word: int) -> None:
        """Change an int, or the address of an array whose shape stays (or shrinks, if the kernel need not know)."""
        self._words[self._at[name]] = word

    def __call__(self, blocks: tuple[int, int], threads: int, stream: int) -> None:
        """Launch it on the stream with this handle; returns before it is done.

        Raises:
            LaunchError: the driver refused.
        """
        (status,) = self._launch(
            self._function, blocks[0], blocks[1], 1, threads, 1, 1, 0, stream, self._parameters, 0
        )  # fmt: skip
        if status != 0:
            raise LaunchError(f"launch of {blocks} blocks of {threads} threads: {status!r}")


def prepared(kernel: Any, arguments: tuple[Any, ...]) -> PreparedLaunch | None:
    """The launch; None under the simulator, and with a line in the log where numba-cuda is not as it was."""
    if config.ENABLE_CUDASIM:
        return None
    try:
        found = version("numba-cuda")
        if tuple(found.split(".")[:2]) not in KNOWN:
            raise ImportError(f"numba-cuda {found} may lay arguments out in another way")
        return PreparedLaunch(kernel, arguments)
    except (AttributeError, ImportError, TypeError) as error:
        logger.warning("freedraft: kernels are launched through Numba, which is slower (%s)", error)
        return None


def type_of(argument: Any) -> Any:
    """The type that a kernel is compiled for."""
    if isinstance(argument, int):
        return types.int64
    if isinstance(argument, np.float32):
        return types.float32
    return types.Array(from_dtype(argument.dtype), argument.ndim, "C")


def words(argument: Any) -> list[bytes]:
    """An argument as kernels take it: a word of 8 bytes, or those of an array in the order of Numba's array model."""
    if isinstance(argument, int):
        return [struct.pack("<q", argument)]
    if isinstance(argument, np.float32):
        return [struct.pack("<fi", argument, 0)]
    shape = tuple(map(int, argument.shape))
    itemsize = argument.dtype.itemsize
    strides = [itemsize * int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    values = (0, 0, int(np.prod(shape, dtype=np.int64)), itemsize, address(argument), *shape, *strides)
    return [struct.pack("<q", value) for value in values]


def address(array: Any) -> int:
    """Where an array's first element is."""
    interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    return int(interface["data"][0])

"""A stand-in for CUDA's driver and for compiled kernels, so that prepared launches run under Numba's simulator.

It reads a launch's arguments out of the memory that it is given, as a kernel would, and hands them to the simulated
kernel. Addresses are those of host memory, so what they point to must be kept by whoever launches.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np


class SimulatedDriver:
    """`install(monkeypatch, ...)` puts it in the place of cuda.bindings.driver; `launches`: (grid, threads, stream)."""

    def __init__(self):
        self.kernels = []
        self.launches = []
        self.answer = 0

    def compiled(self, simulated):
        """A stand-in for `simulated` as numba-cuda has kernels that it compiles."""
        self.kernels.append((simulated, []))
        return CompiledStandIn(simulated, len(self.kernels), self.kernels[-1][1])

    def launch(self, function, *given):
        """As cuLaunchKernel."""
        *sizes, shared, stream, parameters, extra = given
        assert (sizes[2], sizes[4:], shared, extra) == (1, [1, 1], 0, 0)
        grid, threads = tuple(sizes[:2]), sizes[3]
        self.launches.append((grid, threads, stream))
        if self.answer == 0:
            simulated, types = self.kernels[function - 1]
            simulated[grid, threads](*decoded(types, parameters))
        return (self.answer,)

    def install(self, monkeypatch):
        """Let `launching` use this driver, and the scan and the corpus these kernels."""
        from cuda.bindings import driver

        from freedraft.retrieval.cuda import corpus_on_gpu, launching, on_gpu

        monkeypatch.setattr(driver, "cuLaunchKernel", self.launch)
        monkeypatch.setattr(driver, "CUfunction", int)
        monkeypatch.setattr(launching, "config", SimpleNamespace(ENABLE_CUDASIM=0))
        scan_kernel = on_gpu.scan_kernel
        monkeypatch.setattr(on_gpu, "scan_kernel", lambda threads: self.compiled(scan_kernel(threads)))
        monkeypatch.setattr(corpus_on_gpu, "corpus_kernel", self.compiled(corpus_on_gpu.corpus_kernel))
        return self


class CompiledStandIn:
    """A simulated kernel that is also asked for its machine code; notes the types in `types`."""

    def __init__(self, simulated, handle, types):
        self.simulated, self.py_func, self._handle, self._types = simulated, simulated.fn, handle, types

    def compile(self, types):
        self._types[:] = types
        library = SimpleNamespace(get_cufunc=lambda: SimpleNamespace(handle=self._handle))
        return SimpleNamespace(bind=lambda: None, _codelibrary=library)

    def __getitem__(self, configuration):
        return self.simulated[configuration]


def decoded(types, parameters):
    """The arguments at `parameters`, an address of addresses, for a kernel of these types."""
    at = 0

    def following(kind):
        nonlocal at
        pointer = ctypes.c_void_p.from_address(parameters + 8 * at).value
        at += 1
        return kind.from_address(pointer).value

    for numba_type in types:
        name = str(numba_type)
        if name == "int64":
            yield following(ctypes.c_int64)
        elif name == "float32":
            yield np.float32(following(ctypes.c_float))
        else:
            meminfo, parent, size, itemsize, data = (following(ctypes.c_int64) for _ in range(5))
            shape = [following(ctypes.c_int64) for _ in range(numba_type.ndim)]
            strides = [following(ctypes.c_int64) for _ in range(numba_type.ndim)]
            dtype = np.dtype(str(numba_type.dtype))
            assert (meminfo, parent, size, itemsize) == (0, 0, np.prod(shape), dtype.itemsize)
            memory = (ctypes.c_char * (size * itemsize)).from_address(data) if size else b""
            array = np.frombuffer(memory, dtype).reshape(shape)
            assert size == 0 or list(array.strides) == strides
            yield array

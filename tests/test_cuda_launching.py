"""Prepared launches: arguments laid out as the compiler's own declaration of a kernel says, and as Numba lays them out.

What they launch runs under Numba's simulator, behind a stand-in for the driver (`simulated_driver.py`), in a process of
its own.
"""

from __future__ import annotations

import ctypes
import re
import struct
from importlib.metadata import version
from types import SimpleNamespace

import hopper
import numpy as np
import pytest
import scan_batches
from cuda_simulator import SIMULATED, assert_passes_simulated

ARGUMENTS = (np.zeros((3, 5), np.int32), 7, np.float32(0.25), np.zeros(4, np.int64))
pytest.importorskip("numba.cuda", reason="needs numba-cuda")


def read(launch):
    """The 8-byte words that a launch would hand to the driver."""
    pointers = (ctypes.c_void_p * len(launch._words)).from_address(launch._parameters)
    return [ctypes.c_int64.from_address(pointer).value for pointer in pointers]


def stand_in(compile_for=None):
    """A kernel `f(tokens, budget, least, rows)` that numba-cuda has compiled."""

    def f(tokens, budget, least, rows):
        raise AssertionError

    library = SimpleNamespace(get_cufunc=lambda: SimpleNamespace(handle=5))
    compiled = SimpleNamespace(bind=lambda: None, _codelibrary=library)
    return SimpleNamespace(py_func=f, compile=compile_for or (lambda types: compiled))


@pytest.fixture
def driver(monkeypatch):
    """The driver's launch, which notes what it is asked for and answers `status`."""
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python")
    from cuda.bindings import driver

    from freedraft.retrieval.cuda import launching

    noted = SimpleNamespace(calls=[], status=driver.CUresult.CUDA_SUCCESS)
    monkeypatch.setattr(driver, "cuLaunchKernel", lambda *given: noted.calls.append(given) or (noted.status,))
    monkeypatch.setattr(launching, "config", SimpleNamespace(ENABLE_CUDASIM=0))
    return noted


def test_a_launch_hands_the_driver_what_was_laid_out(driver):
    from freedraft.retrieval.cuda.launching import LaunchError, PreparedLaunch

    tokens, budget, least, rows = ARGUMENTS
    launch = PreparedLaunch(stand_in(), ARGUMENTS)
    quarter = struct.unpack("<q", struct.pack("<fi", least, 0))[0]
    expected = [0, 0, 15, 4, tokens.ctypes.data, 3, 5, 20, 4, budget, quarter, 0, 0, 4, 8, rows.ctypes.data, 4, 8]
    assert read(launch) == expected
    launch.change("budget", -2)
    launch.change("rows", 2**45)
    expected[9], expected[15] = -2, 2**45
    assert read(launch) == expected
    launch((6, 7), 32, 99)
    ((function, *sizes),) = driver.calls
    assert int(function) == 5
    assert sizes == [6, 7, 1, 32, 1, 1, 0, 99, launch._parameters, 0]
    with pytest.raises(KeyError):
        launch.change("no such argument", 0)
    from cuda.bindings.driver import CUresult

    driver.status = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(LaunchError, match=r"\(6, 7\) blocks of 32 threads: .*CUDA_ERROR_INVALID_VALUE"):
        launch((6, 7), 32, 99)


@pytest.mark.parametrize("error", [AttributeError("no _codelibrary"), ImportError("no cuda"), TypeError("handle")])
def test_where_numba_is_not_as_it_was_numba_launches(driver, caplog, error):
    from freedraft.retrieval.cuda.launching import prepared

    def fail(types):
        raise error

    assert prepared(stand_in(fail), ARGUMENTS) is None
    assert f"launched through Numba, which is slower ({error})" in caplog.text


if SIMULATED:
    from simulated_driver import SimulatedDriver

    from freedraft.retrieval.cuda.on_cpu import draft_on_cpu
    from freedraft.retrieval.cuda.on_gpu import DeviceScan
    from freedraft.retrieval.cuda.rules import Rules
    from freedraft.retrieval.cuda.step import prepared_step
    from freedraft.retrieval.errors import InputError

    def outputs(rows, columns=4):
        return (
            np.full((rows, columns), -99, np.int64),
            np.full((rows, columns), np.nan, np.float32),
            np.zeros(rows, "i4"),
        )

    def test_the_simulator_prepares_nothing():
        from freedraft.retrieval.cuda.launching import prepared

        assert prepared(None, ARGUMENTS) is None

    def test_a_prepared_step_drafts_like_the_twin_as_rows_and_budget_change(monkeypatch):
        driver = SimulatedDriver().install(monkeypatch)
        generator = np.random.default_rng(8)
        batch = scan_batches.random_batch(generator, 4)
        drafts, probability, counts = written = outputs(4)
        scan = DeviceScan(4, batch.tokens.shape[1], blocks=8, threads=8)
        step = prepared_step(scan, None, batch, written, Rules())
        for number in (4, 2, 3):
            rows = np.ascontiguousarray(generator.permutation(4)[:number])
            active = np.array([1, 0, 2, 1][-number:], np.int32)
            step(number, rows.ctypes.data, active.ctypes.data, number - 1, 17)
            expected = outputs(number)
            draft_on_cpu(batch.tokens, batch.lengths, rows, active, *expected, Rules(budget=number - 1))
            for ours, twin in zip((drafts, probability, counts), expected, strict=True):
                np.testing.assert_array_equal(ours[:number], twin)
        with pytest.raises(InputError, match="made for 4 rows, got 5"):
            step(5, rows.ctypes.data, active.ctypes.data, 1, 17)
        step(0, 0, 0, 1, 17)
        assert driver.launches == [((2, 4), 8, 17), ((2, 2), 8, 17), ((2, 3), 8, 17)]

else:

    @pytest.fixture(scope="module")
    def compiled():
        with hopper.compiler() as compile_kernel:
            yield compile_kernel

    def declared(ptx):
        """Types of a kernel's parameters in its PTX."""
        head = ptx[ptx.index(".entry") :]
        return re.findall(r"\.param \.(\w+) ", head[: head.index("{")])

    @pytest.mark.parametrize("name", ["scan", "corpus"])
    def test_the_layout_is_that_of_the_kernels_own_parameters(name, compiled):
        from freedraft.retrieval.cuda import corpus_on_gpu, launching, on_gpu

        i4, i8, f4 = np.int32, np.int64, np.float32
        inputs = np.zeros((2, 9), i4), np.zeros(2, i4), np.zeros(2, i8), np.zeros(2, i4)
        written = np.zeros((2, 3), i8), np.zeros((2, 3), f4), np.zeros(2, i4)
        if name == "scan":
            kernel = on_gpu.scan_kernel(on_gpu.MOST_THREADS)
            arguments = *inputs, 64, 1, 3, f4(0), np.zeros((2, 1, 4), i8), np.zeros(2, i4), *written
        else:
            kernel = corpus_on_gpu.corpus_kernel
            automaton = np.zeros(5, i4), np.zeros((5, 6), i4), np.zeros((5, 4), i4)
            state = np.zeros((2, 8), i4), np.zeros((2, 9), i4)
            found = np.zeros((2, 3), i4), np.zeros((2, 3), f4)
            arguments = *automaton, *state, *inputs, 3, 2, f4(0), *found, *written
        kinds = declared(compiled(kernel, *map(launching.type_of, arguments)))
        words = [word for argument in arguments for word in launching.words(argument)]
        assert len(kinds) == len(words)
        floats = [isinstance(a, np.float32) for a in arguments for _ in launching.words(a)]
        assert [kind in ("f32", "b32", "u32") for kind in kinds] == floats
        assert {kind for kind, is_float in zip(kinds, floats, strict=True) if not is_float} <= {"u64", "b64"}
        assert {len(word) for word in words} == {8}
        parameters = kernel.py_func.__code__.co_varnames[: kernel.py_func.__code__.co_argcount]
        assert len(parameters) == len(arguments)
        assert {"rows", "active", "budget"} <= set(parameters)

    def test_the_layout_is_that_of_numbas_own_launches():
        """By Numba's function for it, with stand-ins for memory on a device."""
        from numba.cuda.cudadrv import devicearray
        from numba.cuda.dispatcher import _Kernel

        from freedraft.retrieval.cuda import launching

        def on_device(array):
            memory = SimpleNamespace(device_ctypes_pointer=ctypes.c_void_p(4096), owner=None, size=array.nbytes)
            return devicearray.DeviceNDArray(array.shape, array.strides, array.dtype, gpu_data=memory)

        if tuple(version("numba-cuda").split(".")[:2]) not in launching.KNOWN:
            pytest.skip("launches are not prepared with this numba-cuda")
        arguments = [on_device(a) if isinstance(a, np.ndarray) else a for a in ARGUMENTS]
        numbas: list = []
        for argument, original in zip(arguments, ARGUMENTS, strict=True):
            _Kernel._prepare_args(SimpleNamespace(extensions=[]), launching.type_of(original), argument, 0, [], numbas)
        values = [getattr(value, "value", value) for value in numbas]
        ours = [word for argument in arguments for word in launching.words(argument)]
        unpacked = [struct.unpack("<q", word)[0] for word in ours]
        unpacked[10] = struct.unpack("<fi", ours[10])[0]
        assert unpacked == values

    def test_prepared_steps_draft_the_same_under_the_simulator():
        assert_passes_simulated(__file__)

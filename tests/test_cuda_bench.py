"""What the benchmarks for a GPU do without one: the check under Numba's simulator, and the way to a result file.

The measurement itself runs here with stand-ins for CUDA's events and driver, so its times mean nothing; what shows is
that it comes through. The simulator must be chosen before numba.cuda is imported, so part of it runs in a process of
its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hopper
import numpy as np
import pytest
from cuda_simulator import SIMULATED
from simulated_driver import SimulatedDriver

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def run(*command, simulator="1"):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": simulator, "NUMBA_DISABLE_JIT": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


if SIMULATED:

    class Event:
        """Stands in for a CUDA event."""

        def record(self):
            pass

        synchronize = record

    class FewThreads:
        """Stands in for a kernel's launches: each thread is one of Python's, and any number reads everything."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, configuration):
            return self.kernel[2, 4]

    def without_vllm(*arrays):
        raise ImportError("no vLLM here")

    def test_the_measurement_comes_through_to_its_result_file(tmp_path, monkeypatch, capsys):
        import gpu
        from numba import cuda

        driver = SimulatedDriver().install(monkeypatch)
        device = SimpleNamespace(name=b"stand-in", compute_capability=(9, 0), MULTIPROCESSOR_COUNT=2)
        monkeypatch.setattr(cuda, "event", lambda timing: Event(), raising=False)
        monkeypatch.setattr(cuda, "event_elapsed_time", lambda begin, end: 1.5, raising=False)
        monkeypatch.setattr(cuda, "get_current_device", lambda: device)
        for name, value in {
            "WARM": 1,
            "REPEATS": 1,
            "STEPS": 2,
            "FLUSHED": 64,
            "SHARES": (1,),
            "SIMULATED": False,
        }.items():
            monkeypatch.setattr(gpu, name, value)
        monkeypatch.setattr(gpu, "read_over", FewThreads(gpu.read_over))
        # vLLM takes half a minute to import, and its part has no stand-in.
        monkeypatch.setattr(gpu, "vllm_step", without_vllm)
        monkeypatch.setattr(gpu, "speculator_step", without_vllm)
        # The check is tested by itself; here it only has to come first.
        monkeypatch.setattr(gpu, "check", lambda: 7)
        monkeypatch.setattr(gpu, "check_corpus", lambda: 2)
        small = gpu.made_up
        monkeypatch.setattr(
            gpu, "made_up", lambda name, rows, length, dice: small(name, min(rows, 8), min(length, 48), dice)
        )
        scan = gpu.DeviceScan
        monkeypatch.setattr(gpu, "DeviceScan", lambda *sizes, **options: scan(*sizes, **options, threads=8))
        monkeypatch.setattr(gpu, "measure_corpus", lambda batches: [{"sequences": 1}])
        monkeypatch.setattr(sys, "argv", ["gpu", "--batches", "1", "2", "--lengths", "48", "--out", str(tmp_path)])
        gpu.main()
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert found["gpu"]["device"] == "stand-in"
        assert found["batches_checked"] == 9
        assert found["prepared launches"] is True
        assert [(row["text"], row["sequences"]) for row in found["results"]] == [
            (text, batch) for text in ("ordinary", "one token only", "nearly as long") for batch in (1, 2)
        ]
        for row in found["results"]:
            # Of two steps the events say 1.5 ms; a cold step is timed alone.
            assert (row["numba"], row["prepared"], row["cold"], row["x copy"]) == (750.0, 750.0, 1500.0, 1.0)
            assert row["graph"] is None
            assert row["graph error"]
            assert row["vllm error"] == row["speculator error"] == "ImportError: no vLLM here"
        assert [row["sequences"] for row in found["blocks"]] == [1, 2]
        assert found["index"] == [{"sequences": 1}]
        monkeypatch.setattr(gpu, "INDEX_PACKAGE", "no_such_package")
        monkeypatch.setattr(gpu.Sizes, "measured", lambda sizes: {"text": sizes.text})
        gpu.main()
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert found["batches_checked"] == 7
        assert found["index"] == "building an index needs no_such_package"
        assert {launch[1] for launch in driver.launches} == {8}

    def test_drafting_from_an_index_is_measured(monkeypatch):
        import gpu
        from numba import cuda

        SimulatedDriver().install(monkeypatch)
        monkeypatch.setattr(gpu, "made_up", lambda *_: np.arange(4 * 64, dtype=np.int32).reshape(4, 64) % 7)
        steps = []
        monkeypatch.setattr(gpu, "timed", lambda step: steps.append(step) or step() or 3.0)
        original = np.full
        monkeypatch.setattr(gpu.np, "full", lambda shape, value, *rest: original(shape, min(value, 32), *rest))
        monkeypatch.setattr(cuda, "event", None, raising=False)
        (row,) = gpu.measure_corpus([2])
        assert (row["sequences"], row["one longer"], row["and drafting"]) == (2, 3.0, 3.0)
        assert len(steps) == 2

else:

    def test_the_kernels_pass_the_check():
        ran = run(str(BENCH / "gpu.py"), "--check-only")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "17 batches: the GPU's drafts, probabilities and counts equal the CPU's" in ran.stdout

    def test_the_simulator_is_not_timed():
        ran = run(str(BENCH / "gpu.py"))
        assert ran.returncode == 2
        assert "the simulator's times mean nothing" in ran.stderr

    def test_the_measurement_under_the_simulator():
        ran = run("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "2 passed" in ran.stdout

    def test_its_own_kernels_compile():
        import gpu
        from numba import types

        def array(kind, axes):
            return types.Array(kind, axes, "C")

        with hopper.compiler() as compiled:
            compiled(gpu.one_longer, array(types.int32, 1), array(types.float32, 2))
            compiled(gpu.read_over, array(types.int32, 1))

    class Engines:
        """A stand-in for engines: `ask` answers from a table of replies, a token in 10 ms."""

        def __init__(self, replies):
            self.replies, self.names, self.asked = replies, list(replies), []

        def ask(self, name, what, texts, *streams):
            self.asked.append((name, what, texts, *streams))
            if what == "gaps":
                return [0.0625 for _ in texts]
            replies = [self.replies[name][text] for text in texts]
            tokens = sum(map(len, replies))
            seconds = tokens * (0.01 if name.startswith("plain") else 0.005)
            prompts = [[len(text)] for text in texts]
            return {
                "prompts": prompts, "replies": replies, "seconds": seconds, "tokens": tokens, "steps": tokens // 2
            }  # fmt: skip

    def test_replies_are_compared_with_plains_of_the_same_runner():
        import vllm_gpu

        texts = {"chat": ["warm", "warm", "a", "bb", "ccc", "d"]}
        same = {"a": [1, 2, 3, 4], "bb": [5, 6], "ccc": [7, 8], "d": [9, 9, 9, 9]}
        other = {**same, "bb": [5, 7], "d": [9, 9]}
        engines = Engines({"plain V1": same, "ngram V1": other, "freedraft V2": same})
        records = vllm_gpu.measure(engines, texts, 2, {1: 1, 8: 1})
        assert [ask[0] for ask in engines.asked[:3]] == ["plain V1", "ngram V1", "freedraft V2"]
        assert [ask[0] for ask in engines.asked[-3:]] == ["ngram V1", "freedraft V2", "plain V1"]
        assert [ask[2:] for ask in engines.asked[::3]] == [(["a"], 1), (["bb"], 8), (["ccc"], 1), (["d"], 8)]
        rows = {(row["streams"], row["method"]): row for row in vllm_gpu.compared(engines, records)}
        ngram = rows[8, "ngram V1"]
        assert (ngram["same replies"], ngram["gaps"], ngram["times plain"]) == ("0 of 2", "0.062, 0.062", 2.0)
        # The prompts and what the replies have in common: a token of two, and all of the shorter one.
        assert engines.asked[-1] == ("plain V1", "gaps", [[2, 5], [1, 9, 9]])
        assert rows[1, "ngram V1"]["same replies"] == rows[1, "plain V1"]["same replies"] == "2 of 2"
        assert rows[1, "freedraft V2"]["same replies"] is None
        assert rows[1, "freedraft V2"]["tokens/s"] == pytest.approx(200)
        assert all(list(row) == list(ngram) for row in rows.values())

    def test_what_cannot_run_says_why(tmp_path, monkeypatch):
        import vllm_gpu

        assert vllm_gpu.missing(vllm_gpu.METHODS["plain V2"]) is None
        (tmp_path / vllm_gpu.V2_FILE).parent.mkdir(parents=True)
        (tmp_path / vllm_gpu.V2_FILE).touch()
        monkeypatch.setattr(
            vllm_gpu, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        )
        assert vllm_gpu.missing(vllm_gpu.METHODS["ngram_gpu V2"]) is None
        monkeypatch.setattr(vllm_gpu, "V2_FILE", "no_such_file.py")
        assert "this vLLM has no no_such_file.py" in vllm_gpu.missing(vllm_gpu.METHODS["ngram_gpu V2"])
        monkeypatch.setattr(vllm_gpu, "entry_points", lambda group: SimpleNamespace(names=[]))
        ours = vllm_gpu.METHODS["freedraft fusion V1"]
        assert "freedraft is not installed" in vllm_gpu.missing(ours)

"""Checks the CUDA kernels against the CPU's, then times the drafting step on the GPU.

python bench/gpu.py [--check-only] [--batches 1 32 256] [--lengths 1024 8192 32768 131072] [--out FOLDER]

The check comes first and ends the run when anything differs. With NUMBA_ENABLE_CUDASIM=1 NUMBA_DISABLE_JIT=1 and
--check-only it needs no GPU. Times are from CUDA events, in microseconds a step:

  numba      launched through Numba
  prepared   launched by one driver call, as the speculator does; steps follow one another, so most tokens are in the L2
             cache if they fit
  cold       likewise, after other memory was read through the cache
  graph      prepared, as a CUDA graph (needs torch)
  copy       a copy of as many bytes from device to device; copy cold: likewise after other memory
  vllm       vLLM's own n-gram kernels on the same tokens, where vLLM has them (they are of its V2 runner)

`host` is what a launch costs the host. Drafting from an index is timed by itself, with sequences that are parts of its
documents; it is left out where pydivsufsort is not installed, which builds the index. The result, with the hardware,
driver and versions, goes to bench/results/gpu.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
from gpu_check import DRAFTED, SIMULATED, check, check_corpus, index_of, made_up
from harness import median, save, show
from numba import cuda
from nvidia_smi import described

from freedraft.retrieval.cuda.corpus_on_gpu import THREADS, DeviceCorpus
from freedraft.retrieval.cuda.launching import address
from freedraft.retrieval.cuda.on_gpu import BLOCKS_PER_PROCESSOR, DeviceScan, processors
from freedraft.retrieval.cuda.rules import Rules
from freedraft.retrieval.cuda.step import prepared_step

WARM, REPEATS, STEPS = 5, 20, 20
FLUSHED = 256 << 20
PACKAGES = ("numba-cuda", "cuda-bindings", "cuda-core", "nvidia-nvvm", "triton")
INDEX_PACKAGE = "pydivsufsort"
SHARES = (2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if SIMULATED and not chosen.check_only:
        parser.error("the simulator's times mean nothing: add --check-only")
    if not SIMULATED and not cuda.is_available():
        parser.error("no GPU that Numba can use; NUMBA_ENABLE_CUDASIM=1 with --check-only checks without one")
    checked = check()
    without_index = None if find_spec(INDEX_PACKAGE) else f"building an index needs {INDEX_PACKAGE}"
    if without_index:
        print(f"left out: drafting from an index, for {without_index}")
    else:
        checked += check_corpus()
    print(f"{checked} batches: the GPU's drafts, probabilities and counts equal the CPU's", flush=True)
    if chosen.check_only:
        return
    results: dict[str, Any] = {"gpu": hardware(), "batches_checked": checked, "results": [], "blocks": []}
    for text in ("ordinary", "one token only", "nearly as long"):
        for length in chosen.lengths:
            every = made_up(text, max(chosen.batches), length, np.random.default_rng(length))
            for batch in chosen.batches:
                sizes = Sizes(text, every[:batch])
                results["prepared launches"] = sizes.step is not None
                results["results"].append(sizes.measured())
                print(results["results"][-1], flush=True)
                # Kept as they come, so that a run that is cut off leaves what it has.
                save("gpu", results, chosen.out)
    for batch in chosen.batches:
        results["blocks"].append(blocks_compared(batch, 32768))
    results["index"] = without_index or measure_corpus(chosen.batches)
    table = [{name: value for name, value in row.items() if not name.endswith("error")} for row in results["results"]]
    show(f"Drafting {DRAFTED} tokens a sequence, microseconds a step", table)
    show(f"Blocks of a launch for each processor (default {BLOCKS_PER_PROCESSOR}), 32k tokens", results["blocks"])
    if not without_index:
        show("Drafting from an index, microseconds a step", results["index"])
    print("written to", save("gpu", results, chosen.out))


class Sizes:
    """Sequences of one text and size on the device, and the ways to draft for them."""

    def __init__(self, text: str, tokens: Any, blocks: int | None = None) -> None:
        batch, length = tokens.shape
        self.text, self.batch, self.length = text, batch, length
        self.tokens = cuda.to_device(np.ascontiguousarray(tokens))
        # A draft must fit in the width, so the sequences end a draft before it.
        lengths = cuda.to_device(np.full(batch, length - DRAFTED, np.int32))
        rows = cuda.to_device(np.arange(batch, dtype=np.int64))
        active = cuda.to_device(np.ones(batch, np.int32))
        self.inputs = self.tokens, lengths, rows, active
        self.outputs = (
            cuda.device_array((batch, DRAFTED), np.int64),
            cuda.device_array((batch, DRAFTED), np.float32),
            cuda.device_array(batch, np.int32),
        )
        self.scan = DeviceScan(batch, length, blocks=blocks)
        # None where numba-cuda is not as it was known; then Numba launches, as in the speculator.
        self.step = prepared_step(self.scan, None, self.inputs, self.outputs, Rules())
        self._changed = address(rows), address(active)

    def launched(self) -> None:
        self.scan.launch(self.inputs, self.outputs, Rules())

    def prepared(self, stream: int = 0) -> None:
        if self.step is None:
            self.scan.launch(self.inputs, self.outputs, Rules(), cuda.external_stream(stream) if stream else 0)
        else:
            self.step(self.batch, *self._changed, DRAFTED, stream)

    def measured(self) -> dict[str, Any]:
        """Times for one size, as medians over repeats of the mean of STEPS steps that follow one another."""
        other = cuda.device_array((self.batch, self.length), np.int32)
        flushed = cuda.to_device(np.zeros(FLUSHED // 4, np.int32))

        def copy() -> None:
            other.copy_to_device(self.tokens)

        row: dict[str, Any] = {
            "text": self.text,
            "sequences": self.batch,
            "tokens each": self.length,
            "numba": timed(self.launched),
            "numba host": host(self.launched),
            "prepared": timed(self.prepared),
            "prepared host": host(self.prepared),
            "cold": timed_cold(self.prepared, flushed),
            "copy": timed(copy),
            "copy cold": timed_cold(copy, flushed),
        }
        row.update(attempt("graph", lambda: timed(captured(self.prepared))))
        row.update(attempt("vllm", lambda: timed(vllm_step(*self.inputs))))
        row.update(attempt("speculator", lambda: timed(speculator_step(*self.inputs))))
        row["x copy"] = round((row["graph"] or row["prepared"]) / row["copy"], 2)
        row["x copy cold"] = round(row["cold"] / row["copy cold"], 2)
        row["vllm / ours"] = round(row["vllm"] / row["prepared"], 2) if row["vllm"] else None
        return row


def blocks_compared(batch: int, length: int) -> dict[str, Any]:
    """Prepared steps with other numbers of blocks, on ordinary text."""
    tokens = made_up("ordinary", batch, length, np.random.default_rng(4))
    row: dict[str, Any] = {"sequences": batch}
    for share in SHARES:
        row[str(share)] = timed(Sizes("ordinary", tokens, share * processors()).prepared)
    return row


def measure_corpus(batches: list[int]) -> list[dict[str, Any]]:
    """Microseconds a step of drafting from an index of 4 M tokens, each sequence a token longer at every step."""
    documents = made_up("ordinary", 1024, 4096, np.random.default_rng(3))
    segments = index_of(documents)
    rows_measured = []
    for batch in batches:
        device = DeviceCorpus(segments, batch, batch)
        inputs = [documents[:batch], np.full(batch, 2048, np.int32), np.arange(batch), np.ones(batch, np.int32)]
        arrays = tuple(map(cuda.to_device, inputs))
        outputs = (
            cuda.device_array((batch, DRAFTED), np.int64),
            cuda.to_device(np.zeros((batch, DRAFTED), np.float32)),
            cuda.device_array(batch, np.int32),
        )
        (launch,) = device.prepare(arrays, outputs, Rules())

        def longer(arrays: Any = arrays, outputs: Any = outputs) -> None:
            one_longer[1, 256](arrays[1], outputs[1])

        def step(
            longer: Any = longer, launch: Any = launch, device: Any = device, given: Any = (arrays, outputs)
        ) -> None:
            longer()
            if launch is None:
                device.launch(*given, Rules())
            else:
                launch(device.grid(len(given[1][2])), THREADS, 0)

        rows_measured.append(
            {"sequences": batch, "MiB": device.bytes >> 20, "one longer": timed(longer), "and drafting": timed(step)}
        )
        print(rows_measured[-1], flush=True)
    return rows_measured


@cuda.jit
def one_longer(lengths: Any, probability: Any) -> None:
    """Let every sequence be a token longer, and forget its draft."""
    row = cuda.threadIdx.x
    while row < lengths.shape[0]:
        lengths[row] += 1
        for i in range(probability.shape[1]):
            probability[row, i] = 0.0
        row += cuda.blockDim.x


@cuda.jit
def read_over(memory: Any) -> None:
    """Read memory, all zeros, so that it takes the place of what was in the cache, as a model's weights do."""
    total = 0
    for at in range(cuda.grid(1), memory.shape[0], cuda.gridsize(1)):
        total += memory[at]
    if total != 0:
        memory[0] = total


def attempt(name: str, call: Callable[[], float]) -> dict[str, Any]:
    """A time, or None and the reason why there is none."""
    try:
        return {name: call()}
    except Exception as error:
        return {name: None, f"{name} error": f"{type(error).__name__}: {error}"[:300]}


def timed(step: Callable[[], Any]) -> float:
    """Microseconds a step."""
    for _ in range(WARM):
        step()
    begin, end = cuda.event(timing=True), cuda.event(timing=True)
    times = []
    for _ in range(REPEATS):
        begin.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        times.append(cuda.event_elapsed_time(begin, end) * 1e3 / STEPS)
    return round(median(times), 2)


def timed_cold(step: Callable[[], Any], flushed: Any) -> float:
    """Microseconds of a step each time after `flushed` was read, which keeps the device busy until it is launched."""
    begin, end = cuda.event(timing=True), cuda.event(timing=True)
    times = []
    for _ in range(WARM + REPEATS):
        read_over[8 * processors(), 256](flushed)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(cuda.event_elapsed_time(begin, end) * 1e3)
    return round(median(times[WARM:]), 2)


def host(step: Callable[[], Any]) -> float:
    """Microseconds that the host spends on a step; it waits for the device between repeats only."""
    times = []
    for _ in range(WARM + REPEATS):
        cuda.synchronize()
        start = perf_counter()
        for _ in range(STEPS):
            step()
        times.append((perf_counter() - start) * 1e6 / STEPS)
    cuda.synchronize()
    return round(median(times[WARM:]), 2)


def captured(step: Callable[[int], None]) -> Callable[[], None]:
    """The step as a CUDA graph, which takes the host's part of a launch out of the time."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(torch.cuda.current_stream().cuda_stream)
    return graph.replay


def runner_of(tokens: Any, lengths: Any, rows: Any, active: Any) -> tuple[Any, ...]:
    """What a speculator of vLLM's V2 runner is made with and called with, on the same memory."""
    import torch

    batch, width = tokens.shape
    shared = [torch.as_tensor(array, device="cuda") for array in (tokens, lengths, rows, active)]
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            method="ngram_gpu", prompt_lookup_min=5, prompt_lookup_max=5, num_speculative_tokens=DRAFTED
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=batch),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(max_model_len=width),
        additional_config={"freedraft": {}},
    )
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=shared[0]), total_len=SimpleNamespace(gpu=shared[1]))
    last = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    inputs = SimpleNamespace(num_reqs=batch, idx_mapping=shared[2])
    return config, torch.device("cuda", torch.cuda.current_device()), states, inputs, shared[3], last


def vllm_step(*arrays: Any) -> Callable[[], None]:
    """vLLM's own drafting step on the same memory, with its default of matches of five tokens."""
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    return proposing(NgramGPUSpeculator, arrays)


def speculator_step(*arrays: Any) -> Callable[[], None]:
    """freedraft's whole step in vLLM's V2 runner, the host's part included."""
    from freedraft.integrations.vllm.gpu.speculator import ScanSpeculator

    return proposing(ScanSpeculator, arrays)


def proposing(speculator: type, arrays: tuple[Any, ...]) -> Callable[[], None]:
    config, device, states, inputs, sampled, last = runner_of(*arrays)
    made = speculator(config, device, states)
    unused = [None] * 4

    def step() -> None:
        made.propose(inputs, *unused, sampled, None, last, None, None, None)

    return step


def hardware() -> dict[str, Any]:
    """The GPU, its driver, and the versions of what compiles for it."""
    from importlib.metadata import PackageNotFoundError, version

    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    found: dict[str, Any] = {
        "device": name,
        "compute_capability": list(device.compute_capability),
        "processors": processors(),
        "driver": described(),
        "packages": {},
    }
    for package in PACKAGES:
        try:
            found["packages"][package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()

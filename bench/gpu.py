"""Checks the CUDA kernels against the CPU's, then times the drafting step on the GPU.

python bench/gpu.py [--check-only] [--batches 1 32 256] [--lengths 1024 8192 32768 131072] [--out FOLDER]

The check comes first and ends the run when anything differs. With NUMBA_ENABLE_CUDASIM=1 NUMBA_DISABLE_JIT=1 and
--check-only it needs no GPU. Times are from CUDA events. Beside each: a copy of the same bytes from device to device
and, where vLLM is installed, vLLM's own n-gram kernels on the same tokens. Drafting from an index is timed by itself,
with sequences that are parts of its documents.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from harness import median, save, show
from numba import cuda

from freedraft.retrieval.cuda.corpus_on_gpu import DeviceCorpus
from freedraft.retrieval.cuda.corpus_rows import SEEN_FIELDS, draft_rows_on_cpu
from freedraft.retrieval.cuda.on_cpu import draft_on_cpu
from freedraft.retrieval.cuda.on_gpu import DeviceScan
from freedraft.retrieval.cuda.rules import Rules
from freedraft.retrieval.index.follow import CURSOR_FIELDS
from freedraft.retrieval.index.segment import Segment
from freedraft.retrieval.index.store import CorpusIndex

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import scan_batches
from small_index import create

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
DRAFTED = 8
WARM, REPEATS, STEPS = 5, 20, 20
PACKAGES = ("numba-cuda", "cuda-bindings", "cuda-core", "triton")


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
    checked = check() + check_corpus()
    print(f"{checked} batches: the GPU's drafts, probabilities and counts equal the CPU's")
    if chosen.check_only:
        return
    rows = []
    for text in ("ordinary", "one token only"):
        for length in chosen.lengths:
            for batch in chosen.batches:
                rows.append(measure(text, batch, length))
                print(rows[-1], flush=True)
    from_index = measure_corpus(chosen.batches)
    table = [{name: value for name, value in row.items() if not name.endswith("error")} for row in rows]
    show(f"Drafting {DRAFTED} tokens a sequence, microseconds a step", table)
    show("Drafting from an index, microseconds a step", from_index)
    results = {"gpu": hardware(), "batches_checked": checked, "results": rows, "index": from_index}
    print("written to", save("gpu", results, chosen.out))


def check() -> int:
    """Compare the kernels with their twins; the number of batches, or an AssertionError that shows the difference."""
    generator = np.random.default_rng(1)
    rules = [Rules(), Rules(5, 2), Rules(64, 1, 3, 0.25)]
    batches = list(scan_batches.adversarial().values())
    batches += [scan_batches.random_batch(generator) for _ in range(4 if SIMULATED else 200)]
    sizes = {"blocks": 12, "threads": 8} if SIMULATED else {"blocks": 24, "threads": 32}
    checked = 0
    for batch in batches:
        for rule in rules[:1] if SIMULATED else rules:
            compare(batch, rule, sizes)
            checked += 1
    if not SIMULATED:
        for name in ("ordinary", "one token only"):
            tokens = made_up(name, 16, 40_000, generator)
            lengths = generator.integers(0, 40_001, 16)
            lengths[:4] = 40_000, 39_999, 1, 0
            rows, active = generator.permutation(16), np.ones(16)
            batch = scan_batches.Batch(tokens, lengths.astype(np.int32), rows.astype(np.int64), active.astype(np.int32))
            compare(batch, Rules(), {})
            checked += 1
    return checked


def compare(batch: Any, rules: Rules, sizes: dict[str, int]) -> None:
    rows = len(batch.rows)

    def poisoned() -> tuple[Any, ...]:
        return (
            np.full((rows, DRAFTED), -99, np.int64),
            np.full((rows, DRAFTED), np.nan, np.float32),
            np.full(rows, -99, np.int32),
        )

    expected = poisoned()
    draft_on_cpu(*batch, *expected, rules)
    written = [cuda.to_device(array) for array in poisoned()]
    DeviceScan(rows, batch.tokens.shape[1], **sizes).draft(*map(cuda.to_device, batch), *written, rules)
    for ours, twin in zip(written, expected, strict=True):
        np.testing.assert_array_equal(ours.copy_to_host(), twin)


def check_corpus() -> int:
    """Compare drafting from an index, over steps in which sequences grow; the number of batches."""
    generator = np.random.default_rng(2)
    slots, width, steps = (4, 96, 3) if SIMULATED else (64, 2048, 40)
    segments = index_of(generator.integers(0, 9, (4, 4 * width)))
    device = DeviceCorpus(segments, slots, slots)
    states = [(np.zeros((slots, CURSOR_FIELDS), np.int32), np.zeros((slots, SEEN_FIELDS), np.int32)) for _ in segments]
    tokens = generator.integers(0, 9, (slots, width)).astype(np.int32)
    lengths = generator.integers(0, width // 2, slots).astype(np.int32)
    active = np.ones(slots, np.int32)
    for _ in range(steps):
        lengths += generator.integers(0, 6, slots).astype(np.int32)
        rows = generator.permutation(slots)
        expected = (np.zeros((slots, DRAFTED), np.int64), np.zeros((slots, DRAFTED), np.float32), active * 0)
        written = [cuda.to_device(array) for array in expected]
        for segment, state in zip(segments, states, strict=True):
            draft_rows_on_cpu(
                segment.automaton, *state, tokens, lengths, rows, active, DRAFTED, device.min_match, 0.0, *expected
            )
        device.draft(*map(cuda.to_device, (tokens, lengths, rows, active)), *written, Rules())
        for ours, twin in zip(written, expected, strict=True):
            np.testing.assert_array_equal(ours.copy_to_host(), twin)
    return steps


def index_of(documents: Any) -> list[Segment]:
    """The segment of an index of these documents, a row each."""
    with tempfile.TemporaryDirectory() as folder:
        # Mapped files stay readable when their folder has gone.
        return list(CorpusIndex(Path(create(Path(folder) / "i", documents))).segments)


def measure_corpus(batches: list[int]) -> list[dict[str, Any]]:
    """Microseconds a step of drafting from an index of 4 M tokens, each sequence a token longer at every step."""
    documents = made_up("ordinary", 1024, 4096, np.random.default_rng(3))
    segments = index_of(documents)
    rows_measured = []
    for batch in batches:
        device = DeviceCorpus(segments, batch, batch)
        inputs = [documents[:batch], np.full(batch, 2048, np.int32), np.arange(batch), np.ones(batch, np.int32)]
        tokens, lengths, rows, active = map(cuda.to_device, inputs)
        outputs = (
            cuda.device_array((batch, DRAFTED), np.int64),
            cuda.to_device(np.zeros((batch, DRAFTED), np.float32)),
            cuda.device_array(batch, np.int32),
        )

        def step(arrays: Any = (tokens, lengths, rows, active), outputs: Any = outputs, device: Any = device) -> None:
            one_longer[1, 256](arrays[1], outputs[1])
            device.launch(arrays, outputs, Rules())

        rows_measured.append({"sequences": batch, "MiB": device.bytes >> 20, "launched": timed(step)})
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


def made_up(name: str, rows: int, length: int, generator: np.random.Generator) -> Any:
    """Token ids int32 `(rows, length)`: of a large vocabulary with repeated passages, or all the same."""
    if name == "one token only":
        return np.full((rows, length), 7, np.int32)
    tokens = generator.zipf(1.3, (rows, length)).clip(max=100_000).astype(np.int32)
    passage = length // 10
    tokens[:, -passage:] = tokens[:, passage : 2 * passage]
    return tokens


def measure(name: str, batch: int, length: int) -> dict[str, Any]:
    """Times for one size, as medians over repeats of the mean of STEPS steps that follow one another."""
    tokens = cuda.to_device(made_up(name, batch, length, np.random.default_rng(batch)))
    # A draft must fit in the width, so the sequences end a draft before it.
    lengths = cuda.to_device(np.full(batch, length - DRAFTED, np.int32))
    rows = cuda.to_device(np.arange(batch, dtype=np.int64))
    active = cuda.to_device(np.ones(batch, np.int32))
    drafts = cuda.device_array((batch, DRAFTED), np.int64)
    probability = cuda.device_array((batch, DRAFTED), np.float32)
    counts = cuda.device_array(batch, np.int32)
    copy = cuda.device_array((batch, length), np.int32)
    scan = DeviceScan(batch, length)
    inputs, outputs = (tokens, lengths, rows, active), (drafts, probability, counts)

    def step(stream: Any = 0) -> None:
        scan.launch(inputs, outputs, Rules(), stream)

    row: dict[str, Any] = {
        "text": name,
        "sequences": batch,
        "tokens each": length,
        "launched": timed(step),
        "copy": timed(lambda: copy.copy_to_device(tokens)),
    }
    row.update(attempt("graph", lambda: timed(captured(step))))
    row.update(attempt("vllm", lambda: timed(vllm_step(tokens, lengths, rows, active))))
    fastest = row["graph"] or row["launched"]
    row["x copy"] = round(fastest / row["copy"], 2)
    row["vllm / ours"] = round(row["vllm"] / row["launched"], 2) if row["vllm"] else None
    return row


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


def captured(step: Callable[[Any], None]) -> Callable[[], None]:
    """The step as a CUDA graph, which takes the host's part of a launch out of the time."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(cuda.external_stream(torch.cuda.current_stream().cuda_stream))
    return graph.replay


def vllm_step(tokens: Any, lengths: Any, rows: Any, active: Any) -> Callable[[], None]:
    """vLLM's own drafting step on the same memory, with its default of matches of five tokens."""
    import torch
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    batch, width = tokens.shape
    shared = [torch.as_tensor(array, device="cuda") for array in (tokens, lengths, rows, active)]
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            method="ngram_gpu", prompt_lookup_min=5, prompt_lookup_max=5, num_speculative_tokens=DRAFTED
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=batch),
        model_config=SimpleNamespace(max_model_len=width),
        additional_config={},
    )
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=shared[0]), total_len=SimpleNamespace(gpu=shared[1]))
    own = NgramGPUSpeculator(config, torch.device("cuda"), states)
    last = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    inputs = SimpleNamespace(num_reqs=batch, idx_mapping=shared[2])
    unused = [None] * 4

    def step() -> None:
        own.propose(inputs, *unused, shared[3], None, last, None, None, None)

    return step


def hardware() -> dict[str, Any]:
    """The GPU, its driver, and the versions of what compiles for it."""
    from importlib.metadata import PackageNotFoundError, version

    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    found: dict[str, Any] = {"device": name, "compute_capability": list(device.compute_capability), "packages": {}}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        found["driver"] = f"unknown ({error})"
    for package in PACKAGES:
        try:
            found["packages"][package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()

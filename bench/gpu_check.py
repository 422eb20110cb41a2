"""Compares the CUDA kernels with their twins on the CPU, on a GPU or under Numba's simulator."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numba import cuda

from freedraft.retrieval.cuda.corpus_on_gpu import DeviceCorpus
from freedraft.retrieval.cuda.corpus_rows import SEEN_FIELDS, draft_rows_on_cpu
from freedraft.retrieval.cuda.launching import address
from freedraft.retrieval.cuda.on_cpu import draft_on_cpu
from freedraft.retrieval.cuda.on_gpu import DeviceScan
from freedraft.retrieval.cuda.rules import Rules
from freedraft.retrieval.cuda.step import prepared_step
from freedraft.retrieval.index.follow import CURSOR_FIELDS
from freedraft.retrieval.index.segment import Segment
from freedraft.retrieval.index.store import CorpusIndex

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import scan_batches
from cuda_simulator import SIMULATED, give_way
from small_index import create

if SIMULATED:
    give_way()
DRAFTED = 8
Arrays = tuple[Any, ...]


def check() -> int:
    """Compare the scan with its twin; the number of batches, or an AssertionError that shows the difference."""
    rules = [Rules()] if SIMULATED else [Rules(), Rules(5, 2), Rules(64, 1, 3, 0.25), Rules(400)]
    checked = 0
    for batch, sizes in batches():
        for rule in rules:
            compare(batch, rule, sizes)
            checked += 1
    return checked


def batches() -> Iterator[tuple[Any, dict[str, int]]]:
    """Batches, and the sizes to launch them with: of small blocks, so that small texts have many, and the default."""
    generator = np.random.default_rng(1)
    some = [*scan_batches.adversarial().values()]
    some += [scan_batches.random_batch(generator) for _ in range(4 if SIMULATED else 200)]
    for batch in some:
        if SIMULATED:
            yield batch, {"blocks": 12, "threads": 8}
        else:
            yield batch, {"blocks": 24, "threads": 32}
            yield batch, {}
    if not SIMULATED:
        for name in ("ordinary", "one token only", "nearly as long"):
            tokens = made_up(name, 16, 40_000, generator)
            lengths = generator.integers(0, 40_001, 16)
            lengths[:4] = 40_000, 39_999, 1, 0
            rows, active = generator.permutation(16), np.ones(16)
            active[generator.integers(16)] = 0
            batch = scan_batches.Batch(tokens, lengths.astype(np.int32), rows.astype(np.int64), active.astype(np.int32))
            yield batch, {}
            yield batch, {"blocks": 16}
            yield batch, {"blocks": 10_000, "threads": 64}


def compare(batch: Any, rules: Rules, sizes: dict[str, int]) -> None:
    """Compare a launch through Numba, and where there are such, prepared ones: at once and from a CUDA graph."""
    rows = len(batch.rows)

    def poisoned() -> Arrays:
        return (
            np.full((rows, DRAFTED), -99, np.int64),
            np.full((rows, DRAFTED), np.nan, np.float32),
            np.full(rows, -99, np.int32),
        )

    expected = poisoned()
    draft_on_cpu(*batch, *expected, rules)
    scan = DeviceScan(rows, batch.tokens.shape[1], **sizes)
    inputs = tuple(map(cuda.to_device, batch))

    def assert_writes(launch: Callable[[Arrays], None]) -> None:
        written = tuple(map(cuda.to_device, poisoned()))
        launch(written)
        for ours, twin in zip(written, expected, strict=True):
            np.testing.assert_array_equal(ours.copy_to_host(), twin)

    assert_writes(lambda written: scan.draft(*inputs, *written, rules))
    if SIMULATED:
        return

    def launch_prepared(written: Arrays) -> None:
        step = prepared_step(scan, None, inputs, written, rules)
        if step is None:
            scan.draft(*inputs, *written, rules)
            return
        step(rows, address(inputs[2]), address(inputs[3]), rules.limit(DRAFTED), 0)
        cuda.synchronize()

    assert_writes(launch_prepared)


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


def made_up(name: str, rows: int, length: int, generator: np.random.Generator) -> Any:
    """Token ids int32 `(rows, length)`.

    "ordinary": of a large vocabulary, with a repeated passage at the end. "one token only": all the same. "nearly as
    long": all the same but every 64th, so that most places match long, and none as long as counts.
    """
    if name == "one token only":
        return np.full((rows, length), 7, np.int32)
    if name == "nearly as long":
        tokens = np.full((rows, length), 7, np.int32)
        tokens[:, :-64:64] = 9
        return tokens
    tokens = generator.zipf(1.3, (rows, length)).clip(max=100_000).astype(np.int32)
    passage = length // 10
    tokens[:, -passage:] = tokens[:, passage : 2 * passage]
    return tokens

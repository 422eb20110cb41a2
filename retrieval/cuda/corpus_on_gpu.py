"""Indexes on the GPU: their automata are uploaded once, and each slot's place in them is kept there.

A thread drafts for a row: it follows the tokens that came, a few memory reads each, and walks the likeliest
continuation. It is the only one of its block: rows take different ways, and threads of one warp would wait for each
other's reads. A launch a segment; no synchronisation, no allocation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numba import cuda

from freedraft.retrieval.cuda.corpus_rows import SEEN_FIELDS, draft_row
from freedraft.retrieval.cuda.launching import PreparedLaunch, prepared
from freedraft.retrieval.cuda.on_gpu import launchable, sequence_length
from freedraft.retrieval.cuda.rules import MOST_DRAFTED, Rules, checked_batch
from freedraft.retrieval.errors import CapacityError, InputError
from freedraft.retrieval.index.follow import CURSOR_FIELDS
from freedraft.retrieval.index.segment import Segment
from freedraft.retrieval.ragged import MAX_TOKEN

THREADS = 1


class DeviceCorpus:
    """Draws drafts from the segments of indexes, for the rows of a batch, on one device.

    Attributes:
        batch: rows, at most.
        bytes: of device memory that it takes.
    """

    SHARE = 0.9
    """Of the device's free memory, it takes no more than this."""

    def __init__(
        self,
        segments: Sequence[Segment],
        batch: int,
        slots: int,
        min_match: int = 2,
        vocabulary_size: int = MAX_TOKEN + 1,
    ) -> None:
        """Verify the segments, upload them, and make room for the state of `slots` slots.

        Args:
            segments: of one index or several.
            batch: rows of a batch, at most.
            slots: sequences whose place is kept.
            min_match: draft only after a suffix of so many tokens that a segment knows.
            vocabulary_size: the model's; token ids are below it.

        Raises:
            InputError: sizes below 1.
            CorpusIndexError: a segment is damaged, or has other tokens.
            CapacityError: the device has too little free memory.
        """
        if batch < 1 or slots < 1 or min_match < 1:
            raise InputError(f"device corpus: expected sizes from 1 up, got {batch}, {slots}, {min_match}")
        self.batch, self.min_match = batch, min_match
        state = 4 * slots * (CURSOR_FIELDS + SEEN_FIELDS)
        self.bytes = sum(state + sum(array.nbytes for array in segment.automaton) for segment in segments)
        free = free_bytes()
        if self.bytes > self.SHARE * free:
            raise CapacityError(
                f"the indexes take {self.bytes >> 20} MiB of the device, which has {int(free) >> 20} MiB free: "
                "build a smaller one (--min-count), or leave the runtime less (in vLLM: gpu_memory_utilization)"
            )
        for segment in segments:
            segment.verify(vocabulary_size)
        self._automata = [tuple(cuda.to_device(np.ascontiguousarray(a)) for a in s.automaton) for s in segments]
        self._cursors = [cuda.to_device(np.zeros((slots, CURSOR_FIELDS), np.int32)) for _ in segments]
        self._seen = [cuda.to_device(np.zeros((slots, SEEN_FIELDS), np.int32)) for _ in segments]
        self._found = cuda.device_array((batch, MOST_DRAFTED), np.int32)
        self._found_probability = cuda.device_array((batch, MOST_DRAFTED), np.float32)

    def draft(
        self,
        tokens: Any,
        lengths: Any,
        rows: Any,
        active: Any,
        drafts: Any,
        probability: Any,
        counts: Any,
        rules: Rules,
        stream: Any = 0,
    ) -> None:
        """Launch the drafting of every row; returns before it is done.

        A row's draft is replaced where a segment expects more accepted tokens. The arguments are those of
        `DeviceScan.draft`, whose drafts it improves; no slot may be in two rows.

        Raises:
            InputError: shapes or types that do not fit one another or the workspace.
        """
        checked_batch(tokens, lengths, rows, active, drafts, probability, counts)
        self.launch((tokens, lengths, rows, active), (drafts, probability, counts), rules, stream)

    def launch(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...], rules: Rules, stream: Any = 0) -> None:
        """As `draft`, of arrays whose types are known to be right: `(tokens, lengths, rows, active)` and outputs.

        Raises:
            InputError: more rows or slots than it was made for.
        """
        batch = outputs[0].shape[0]
        if batch:
            for arguments in self._arguments(inputs, outputs, rules):
                corpus_kernel[self.grid(batch), THREADS, stream](*arguments)

    def prepare(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...], rules: Rules) -> list[PreparedLaunch | None]:
        """What `launch` launches, one for each segment; see `DeviceScan.prepare`."""
        return [prepared(corpus_kernel, arguments) for arguments in self._arguments(inputs, outputs, rules)]

    def grid(self, batch: int) -> tuple[int, int]:
        """A block a row."""
        return batch, 1

    def _arguments(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...], rules: Rules) -> Iterator[tuple[Any, ...]]:
        batch, columns = outputs[0].shape
        slots = self._seen[0].shape[0] if self._seen else inputs[0].shape[0]
        if batch > self.batch or inputs[0].shape[0] > slots:
            raise InputError(
                f"device corpus: made for {self.batch} rows of {slots} slots, got {batch} of {inputs[0].shape[0]}"
            )
        if columns > MOST_DRAFTED:
            raise InputError(f"device corpus: made for drafts of up to {MOST_DRAFTED} tokens, got room for {columns}")
        limits = rules.limit(outputs[0].shape[1]), self.min_match, np.float32(rules.least)
        for automaton, cursors, seen in zip(self._automata, self._cursors, self._seen, strict=True):
            yield (
                *automaton, cursors, seen, *inputs, *limits, self._found, self._found_probability, *outputs,
            )  # fmt: skip


def free_bytes() -> float:
    """Free memory of the current device, in bytes."""
    return float(cuda.current_context().get_memory_info()[0])


@launchable
def corpus_kernel(
    text: Any,
    nodes: Any,
    edges: Any,
    cursors: Any,
    seen: Any,
    tokens: Any,
    lengths: Any,
    rows: Any,
    active: Any,
    budget: int,
    min_match: int,
    least: float,
    found: Any,
    found_probability: Any,
    drafts: Any,
    probability: Any,
    counts: Any,
) -> None:
    """Draft for a row from one segment, a thread a row; see `corpus_rows.draft_row`."""
    moved = cuda.local.array(CURSOR_FIELDS, np.int32)
    best = cuda.local.array(CURSOR_FIELDS, np.int32)
    row = cuda.blockIdx.x
    slot = rows[row]
    length = sequence_length(tokens, lengths, slot)
    if length == 0 or active[row] <= 0:
        return
    count = draft_row(
        text, nodes, edges, cursors[slot], seen[slot], moved, best, tokens[slot], length, budget, min_match, least,
        found[row], found_probability[row], drafts[row], probability[row],
    )  # fmt: skip
    if count >= 0:
        counts[row] = count

"""The scan on the GPU: two kernel launches a step, no synchronisation, no allocation.

The first kernel reads every sequence once: a block takes a stretch of one sequence, each of its threads keeps the best
places that it meets, and the block keeps the best of these. The second merges a sequence's blocks and votes. Both only
launch, on the caller's stream, and all memory is made beforehand, so a CUDA graph can capture them.

Importing this imports numba.cuda, which sees a driver or, with NUMBA_ENABLE_CUDASIM=1, simulates one in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import cuda

from freedraft.retrieval.cuda import places
from freedraft.retrieval.cuda.rules import Rules, checked_batch
from freedraft.retrieval.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

PLACES = places.PLACES
MOST_THREADS = 256
VOTING_THREADS = 32
MOST_ROWS = 65535  # of a grid's second axis


def launchable(function: Callable[..., None]) -> Any:
    """Compile a kernel for the device at its first launch, and keep the result on disk."""
    return cuda.jit(cache=True)(function)


def on_device(function: F) -> F:
    """Compile a function that kernels call."""
    compiled: F = cuda.jit(device=True)(function)
    return compiled


sequence_length = on_device(places.sequence_length)
match_length = on_device(places.match_length)
keep_place = on_device(places.keep_place)
vote = on_device(places.vote)


class DeviceScan:
    """Drafts for the rows of a batch, of any size up to `batch`, on one device.

    Attributes:
        batch: rows, at most.
        width: tokens of a sequence, at most.
        chunk: tokens that a block reads.
        threads: threads of a block, a power of two.
    """

    def __init__(self, batch: int, width: int, *, chunk: int = 2048, threads: int = MOST_THREADS) -> None:
        """Allocate the workspace, 32 bytes a block, on the current device.

        Raises:
            InputError: sizes that no grid can have.
        """
        if not 1 <= batch <= MOST_ROWS or width < 1 or chunk < 1:
            raise InputError(
                f"device scan: expected 1 <= batch <= {MOST_ROWS}, width and chunk >= 1, got {batch}, {width}, {chunk}"
            )
        if threads < PLACES or threads > MOST_THREADS or threads & (threads - 1):
            raise InputError(
                f"device scan: threads: expected a power of two from {PLACES} to {MOST_THREADS}, got {threads}"
            )
        self.batch, self.width, self.chunk, self.threads = batch, width, chunk, threads
        self.blocks = max(1, -(-(width - 1) // chunk))
        self._found = cuda.device_array((batch, self.blocks, PLACES), np.int64)

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

        All arrays are on the device (under the simulator, NumPy's will do) and C-contiguous along their last axis.

        Args:
            tokens: int32 `(slots, width)`, the sequences; only read.
            lengths: int32 `(slots,)`, of the sequences; clipped to 0..width.
            rows: int64 `(n,)`, the slot of each batch row; out of bounds = no draft.
            active: int32 `(n,)`, 0 = no draft for this row.
            drafts: int64 `(n, k)`, written in full: the draft, then the sequence's last token.
            probability: float32 `(n, k)`, written in full: that a token is accepted with all before it; then 0.
            counts: int32 `(n,)`, written: how many of a row's tokens are drafted.
            rules: limits of the search.
            stream: a Numba stream.

        Raises:
            InputError: shapes or types that do not fit one another or the workspace.
        """
        checked_batch(tokens, lengths, rows, active, drafts, probability, counts)
        self.launch((tokens, lengths, rows, active), (drafts, probability, counts), rules, stream)

    def launch(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...], rules: Rules, stream: Any = 0) -> None:
        """As `draft`, of arrays whose types are known to be right: `(tokens, lengths, rows, active)` and outputs.

        Raises:
            InputError: more rows or wider sequences than the workspace is for.
        """
        batch, columns = outputs[0].shape
        if batch > self.batch or inputs[0].shape[1] > self.width:
            raise InputError(
                f"device scan: made for {self.batch} rows of {self.width} tokens, got {batch} of {inputs[0].shape[1]}"
            )
        if not batch:
            return
        scan_kernel[(self.blocks, batch), self.threads, stream](
            *inputs, rules.longest, rules.shortest, self.chunk, self._found
        )
        vote_kernel[batch, VOTING_THREADS, stream](
            *inputs, self.chunk, self._found, rules.limit(columns), np.float32(rules.least), *outputs
        )


@launchable
def scan_kernel(
    tokens: Any,
    lengths: Any,
    rows: Any,
    active: Any,
    longest: int,
    shortest: int,
    chunk: int,
    found: Any,
) -> None:
    """Write the best places of one stretch of one sequence, descending, to `found` int64 `(n, blocks, PLACES)`.

    Block (x, y) reads positions 1 + x * chunk and on of row y. Blocks beyond the sequence write nothing.
    """
    best = cuda.shared.array((MOST_THREADS, PLACES), np.int64)
    block = cuda.blockIdx.x
    row = cuda.blockIdx.y
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    slot = rows[row]
    length = sequence_length(tokens, lengths, slot)
    low = 1 + np.int64(block) * chunk
    if low >= length or active[row] <= 0:
        return
    high = min(low + chunk, length)
    mine = best[thread]
    for i in range(PLACES):
        mine[i] = 0
    kept = np.int64(0)
    last = tokens[slot, length - 1]
    # Neighbouring threads read neighbouring tokens; each goes from recent to old, as the order of places wants it.
    position = high - 1 - thread
    while position >= low and kept < longest:
        # The last token, and the one that decides whether this match can be longer than those kept.
        if (
            tokens[slot, position - 1] == last
            and position > kept
            and tokens[slot, position - 1 - kept] == tokens[slot, length - 1 - kept]
        ):
            matched = match_length(tokens, slot, length, position, longest)
            if matched >= shortest and matched > kept:
                keep_place(mine, (np.int64(matched) << 32) | np.int64(position))
                kept = mine[PLACES - 1] >> 32
        position -= threads
    cuda.syncthreads()
    half = threads >> 1
    while half > 0:
        if thread < half:
            for i in range(PLACES):
                keep_place(mine, best[thread + half, i])
        cuda.syncthreads()
        half >>= 1
    if thread < PLACES:
        found[row, block, thread] = best[0, thread]


@launchable
def vote_kernel(
    tokens: Any,
    lengths: Any,
    rows: Any,
    active: Any,
    chunk: int,
    found: Any,
    budget: int,
    least: float,
    drafts: Any,
    probability: Any,
    counts: Any,
) -> None:
    """Merge what the blocks of a sequence found and vote: a block a row, VOTING_THREADS threads."""
    best = cuda.shared.array((VOTING_THREADS, PLACES), np.int64)
    row = cuda.blockIdx.x
    thread = cuda.threadIdx.x
    slot = rows[row]
    length = sequence_length(tokens, lengths, slot)
    blocks = np.int64(0)
    if length > 1 and active[row] > 0:
        blocks = (length - 1 + chunk - 1) // chunk
    mine = best[thread]
    for i in range(PLACES):
        mine[i] = 0
    block = np.int64(thread)
    while block < blocks:
        for i in range(PLACES):
            keep_place(mine, found[row, block, i])
        block += VOTING_THREADS
    cuda.syncthreads()
    half = VOTING_THREADS >> 1
    while half > 0:
        if thread < half:
            for i in range(PLACES):
                keep_place(mine, best[thread + half, i])
        cuda.syncthreads()
        half >>= 1
    if thread == 0:
        # A slot out of bounds has no tokens, so none of slot 0 is read for it.
        in_bounds = slot if length > 0 else 0
        counts[row] = vote(tokens, in_bounds, length, mine, budget, least, drafts[row], probability[row])

"""The scan on the GPU: one kernel launch a step, no synchronisation, no allocation.

A few blocks share a sequence. Each goes through its tiles of it, the most recent first: a tile, and the tokens before
it that a match may reach, are staged in shared memory, where comparing backwards costs no trip to memory, while the
next tile is already on its way. Each thread keeps the best places that it meets, the block the best of these, and the
block of a sequence that finishes last merges what the others wrote and votes.

All memory is made beforehand and a step only launches, on the caller's stream, so a CUDA graph can capture it.
Importing this imports numba.cuda, which sees a driver or, with NUMBA_ENABLE_CUDASIM=1, simulates one in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numba import cuda

from freedraft.retrieval.cuda import places
from freedraft.retrieval.cuda.launching import PreparedLaunch, prepared
from freedraft.retrieval.cuda.rules import Rules, checked_batch
from freedraft.retrieval.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

PLACES = places.PLACES
MOST_THREADS = 256
MOST_ROWS = 65535  # of a grid's second axis
EACH = 8  # tokens of a tile that each thread loads, all before it needs the first
MOST_STAGED = 64  # tokens before a tile that are staged with it
BLOCKS_PER_PROCESSOR = 8  # of a launch: twice what fits at once, so that one long sequence does not end alone


def launchable(function: Callable[..., None]) -> Any:
    """Compile a kernel for the device at its first launch, and keep the result on disk."""
    return cuda.jit(cache=True)(function)


def on_device(function: F) -> F:
    """Compile a function that kernels call."""
    compiled: F = cuda.jit(device=True)(function)
    return compiled


sequence_length = on_device(places.sequence_length)
keep_place = on_device(places.keep_place)
vote = on_device(places.vote)


class DeviceScan:
    """Drafts for the rows of a batch, of any size up to `batch`, on one device; one step at a time.

    Attributes:
        batch: rows, at most.
        width: tokens of a sequence, at most.
        blocks: of a launch, about; those of a row are at least one, and no more than `threads` or its tiles.
        threads: threads of a block, a power of two.
    """

    def __init__(self, batch: int, width: int, *, blocks: int | None = None, threads: int = MOST_THREADS) -> None:
        """Allocate the workspace, 32 bytes for each tile of each row, on the current device.

        Args:
            batch: rows, at most.
            width: tokens of a sequence, at most.
            blocks: of a launch, about; None = what keeps the device busy.
            threads: threads of a block, a power of two.

        Raises:
            InputError: sizes that no grid can have.
        """
        if not 1 <= batch <= MOST_ROWS or width < 1 or (blocks is not None and blocks < 1):
            raise InputError(
                f"device scan: expected 1 <= batch <= {MOST_ROWS}, width and blocks >= 1, "
                f"got {batch}, {width} and {blocks}"
            )
        if threads < EACH or threads > MOST_THREADS or threads & (threads - 1):
            raise InputError(
                f"device scan: threads: expected a power of two from {EACH} to {MOST_THREADS}, got {threads}"
            )
        self.batch, self.width, self.threads = batch, width, threads
        self.blocks = processors() * BLOCKS_PER_PROCESSOR if blocks is None else blocks
        self._most_blocks = min(threads, max(1, -(-(width - 1) // (EACH * threads))))
        self._found = cuda.device_array((batch, self._most_blocks, PLACES), np.int64)
        self._done = cuda.to_device(np.zeros(batch, np.int32))

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

        All arrays are on the device (under the simulator, NumPy's will do) and C-contiguous.

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
        batch = outputs[0].shape[0]
        if batch > self.batch or inputs[0].shape[1] > self.width:
            raise InputError(
                f"device scan: made for {self.batch} rows of {self.width} tokens, got {batch} of {inputs[0].shape[1]}"
            )
        if batch:
            scan_kernel(self.threads)[self.grid(batch), self.threads, stream](*self._arguments(inputs, outputs, rules))

    def prepare(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...], rules: Rules) -> PreparedLaunch | None:
        """What `launch` launches, ready for `(grid(batch), threads, stream)`; None where Numba has to launch it.

        The arrays are those of the largest batch. For a smaller one only their first rows are read and written.
        """
        return prepared(scan_kernel(self.threads), self._arguments(inputs, outputs, rules))

    def grid(self, batch: int) -> tuple[int, int]:
        """The blocks that share a row, and the rows."""
        return min(self._most_blocks, max(1, self.blocks // batch)), batch

    def _arguments(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...], rules: Rules) -> tuple[Any, ...]:
        limits = rules.longest, rules.shortest, rules.limit(outputs[0].shape[1]), np.float32(rules.least)
        return *inputs, *limits, self._found, self._done, *outputs


def processors() -> int:
    """Multiprocessors of the current device."""
    return int(getattr(cuda.get_current_device(), "MULTIPROCESSOR_COUNT", 1))


@cache
def scan_kernel(threads: int) -> Any:
    """The kernel for blocks of `threads` threads: with the number known, most of its index arithmetic is constants."""
    tile = EACH * threads
    staged = min(threads, MOST_STAGED)
    window_tokens = staged + tile

    @launchable
    def scan(
        tokens: Any,
        lengths: Any,
        rows: Any,
        active: Any,
        longest: int,
        shortest: int,
        budget: int,
        least: float,
        found: Any,
        done: Any,
        drafts: Any,
        probability: Any,
        counts: Any,
    ) -> None:
        """Draft for row `blockIdx.y`, whose tiles `gridDim.x` blocks share.

        Args:
            tokens: see `DeviceScan.draft`, as all that is not named here.
            lengths: likewise.
            rows: likewise.
            active: likewise.
            longest: see `Rules`, as the next three.
            shortest: likewise.
            budget: likewise.
            least: likewise.
            found: int64 `(n, blocks, PLACES)`, what each block of a row found, descending.
            done: int32 `(n,)`, blocks of a row that have finished; 0 before and after.
            drafts: written.
            probability: written.
            counts: written.
        """
        window = cuda.shared.array(window_tokens, np.int32)
        suffix = cuda.shared.array(staged, np.int32)
        longest_found = cuda.shared.array(EACH, np.int32)
        best = cuda.shared.array((PLACES, threads), np.int64)
        is_last = cuda.shared.array(1, np.int32)
        mine = cuda.local.array(PLACES, np.int64)
        following = cuda.local.array(PLACES, np.int64)
        ahead = cuda.local.array(EACH, np.int32)

        row = cuda.blockIdx.y
        block = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        slot = rows[row]
        length = sequence_length(tokens, lengths, slot)
        # A slot out of bounds has no tokens, so none of slot 0 is read for it.
        text = tokens[slot if length > 0 else 0]
        tiles = np.int64(0)
        if active[row] > 0 and length > 1:
            tiles = (length - 2 + tile) // tile
        blocks = min(np.int64(cuda.gridDim.x), max(tiles, np.int64(1)))
        if block >= blocks:
            return
        for i in range(PLACES):
            mine[i] = 0
        if tiles > 0:
            last = text[np.uint32(length - 1)]
            if thread < EACH:
                longest_found[thread] = 0
            if thread < staged and thread < length:
                suffix[thread] = text[np.uint32(length - 1 - thread)]
            # Tile i holds the tokens from i * tile on; its positions are those behind each.
            current = tiles - 1 - block
            before = load(text, current * tile, length, last, threads, staged, thread, ahead)
            while True:
                begin = current * tile
                cuda.syncthreads()
                saturated = 0
                for i in range(EACH):
                    saturated += longest_found[i]
                if saturated >= PLACES:
                    # They are more recent than this tile, in which nothing is longer.
                    break
                for i in range(EACH):
                    window[np.uint32(staged + i * threads + thread)] = ahead[i]
                if thread < staged:
                    window[np.uint32(thread)] = before
                cuda.syncthreads()
                current -= blocks
                if current >= 0:
                    before = load(text, current * tile, length, last, threads, staged, thread, ahead)
                # Of a thread's tokens, and of neighbouring threads', the more recent come first, as places are ordered.
                ends = 0
                newest = window_tokens - 1 - thread
                for i in range(EACH):
                    if window[np.uint32(newest - i * threads)] == last:
                        ends |= 1 << i
                i = 0
                while ends > 0:
                    if ends & 1:
                        saturated = 0
                        for j in range(i):
                            saturated += longest_found[j]
                        if saturated < PLACES:
                            at = newest - i * threads
                            position = begin + at - staged + 1
                            most = min(position, longest)
                            near = min(most, staged)
                            matched = 1
                            while matched < near and window[np.uint32(at - matched)] == suffix[np.uint32(matched)]:
                                matched += 1
                            if matched == staged:
                                while matched < most and text[position - 1 - matched] == text[length - 1 - matched]:
                                    matched += 1
                            if matched == longest:
                                cuda.atomic.add(longest_found, i, 1)
                            if matched >= shortest:
                                keep_place(mine, (np.int64(matched) << 32) | position)
                    ends >>= 1
                    i += 1
                if current < 0:
                    break

        merge(best, mine, thread, threads)
        if blocks > 1:
            if thread == 0:
                for i in range(PLACES):
                    found[row, block, i] = mine[i]
                cuda.threadfence()
                is_last[0] = 1 if cuda.atomic.add(done, row, 1) == blocks - 1 else 0
            cuda.syncthreads()
            if is_last[0] == 0:
                return
            cuda.threadfence()
            for i in range(PLACES):
                mine[i] = found[row, thread, i] if thread < blocks else 0
            if thread == 0:
                done[row] = 0
            merge(best, mine, thread, threads)
        if thread == 0:
            counts[row] = vote(text, length, mine, following, budget, least, drafts[row], probability[row])

    return scan


@on_device
def load(
    text: Any, begin: int, length: int, last: int, threads: int, staged: int, thread: int, ahead: Any
) -> Any:  # fmt: skip
    """Read a thread's tokens of the tile at `begin` into `ahead`, and return its token of those staged before.

    Behind the last token but one there is no position: something else than the last token stands for those.
    """
    # What the compiler knows to be small and positive it takes into the loads' addresses.
    at = np.int64(np.uint32(begin + thread))
    if begin + EACH * threads < length:
        for i in range(EACH):
            ahead[i] = text[at + i * threads]
    else:
        for i in range(EACH):
            ahead[i] = text[at + i * threads] if at + i * threads < length - 1 else ~last
    return text[np.uint32(at - staged)] if thread < staged <= at else ~last


@on_device
def merge(best: Any, mine: Any, thread: int, threads: int) -> None:
    """Leave the best places of all threads of a block in thread 0's `mine`; `best` is shared by them."""
    if not cuda.syncthreads_or(np.int32(mine[0] > 0)):
        return
    half = threads
    while half > 1:
        half >>= 1
        if half <= thread < 2 * half:
            for i in range(PLACES):
                best[i, np.uint32(thread)] = mine[i]
        cuda.syncthreads()
        if thread < half:
            for i in range(PLACES):
                keep_place(mine, best[i, np.uint32(thread + half)])
    cuda.syncthreads()

"""A heap of the nodes that a best-first tree may get next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float64, Int32

ORDER, TOKEN, PARENT = range(3)


class Heap(NamedTuple):
    """Candidates, the likeliest on top; of equals the one found first. How many there are the caller keeps.

    Attributes:
        likelihood: float64 `(room,)`, with all ancestors.
        node: int32 `(room, 3)`: the order it was found in, its token and its parent.
    """

    likelihood: Float64
    node: Int32


def new_heap(room: int) -> Heap:
    """A heap with room for so many entries."""
    return Heap(np.empty(room), np.empty((room, 3), np.int32))


@kernel
def before(heap: Heap, a: int, b: int) -> bool:
    """Whether entry a comes before entry b."""
    if heap.likelihood[a] != heap.likelihood[b]:
        return heap.likelihood[a] > heap.likelihood[b]
    return heap.node[a, ORDER] < heap.node[b, ORDER]


@kernel
def swap(heap: Heap, a: int, b: int) -> None:
    """Exchange two entries."""
    kept = heap.likelihood[a]
    heap.likelihood[a] = heap.likelihood[b]
    heap.likelihood[b] = kept
    for i in range(heap.node.shape[1]):
        field = heap.node[a, i]
        heap.node[a, i] = heap.node[b, i]
        heap.node[b, i] = field


@kernel
def push(heap: Heap, size: int, likelihood: float, order: int, token: int, parent: int) -> None:
    """Add an entry to a heap of `size` entries."""
    heap.likelihood[size] = likelihood
    heap.node[size, ORDER] = order
    heap.node[size, TOKEN] = token
    heap.node[size, PARENT] = parent
    at = size
    while at > 0 and before(heap, at, (at - 1) // 2):
        swap(heap, at, (at - 1) // 2)
        at = (at - 1) // 2


@kernel
def pop(heap: Heap, size: int) -> None:
    """Take the top off a heap, of which `size` entries are left."""
    swap(heap, 0, size)
    at = 0
    while True:
        first = at
        for child in (2 * at + 1, 2 * at + 2):
            if child < size and before(heap, child, first):
                first = child
        if first == at:
            break
        swap(heap, at, first)
        at = first

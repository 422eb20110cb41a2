"""The likeliest branch of each draft: of a tree a part, of a chain all."""

from __future__ import annotations

import numpy as np

from freedraft.plugins.base import Drafts
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64, UInt8


def likeliest_chains(drafts: Drafts) -> tuple[Drafts, Int32]:
    """Follow the likeliest child from the committed text to a leaf, in each row.

    Returns:
        The same rows, all chains; and int32 `(t,)`, for each of their tokens which node of its row it was.
    """
    tokens, parents, probability, source, offsets, nodes = _likeliest_chains(
        drafts.tokens, drafts.parents, drafts.probability, drafts.source, drafts.offsets
    )
    return Drafts(tokens, parents, probability, source, offsets), nodes


@kernel
def _likeliest_chains(
    tokens: Int32, parents: Int32, probability: Float32, source: UInt8, offsets: Int64
) -> tuple[Int32, Int32, Float32, UInt8, Int64, Int32]:
    rows = offsets.shape[0] - 1
    chosen = np.empty(tokens.shape[0], np.int32)
    chosen_parents = np.empty(tokens.shape[0], np.int32)
    chosen_probability = np.empty(tokens.shape[0], np.float32)
    chosen_source = np.empty(tokens.shape[0], np.uint8)
    chosen_offsets = np.zeros(rows + 1, np.int64)
    nodes = np.empty(tokens.shape[0], np.int32)
    used = 0
    for row in range(rows):
        start, stop = offsets[row], offsets[row + 1]
        branches = False
        for i in range(start, stop):
            branches |= parents[i] != i - start - 1
        node = -1
        first = used
        while start + node + 1 < stop:
            best = start + node + 1
            if branches:
                # A node's children are all behind it, in any order.
                best = -1
                for i in range(start + node + 1, stop):
                    if parents[i] == node and (best < 0 or probability[i] > probability[best]):
                        best = i
                if best < 0:
                    break
            chosen[used] = tokens[best]
            chosen_parents[used] = used - first - 1
            chosen_probability[used] = probability[best]
            chosen_source[used] = source[best]
            nodes[used] = best - start
            used += 1
            node = best - start
        chosen_offsets[row + 1] = used
    return (
        chosen[:used], chosen_parents[:used], chosen_probability[:used], chosen_source[:used], chosen_offsets,
        nodes[:used],
    )  # fmt: skip

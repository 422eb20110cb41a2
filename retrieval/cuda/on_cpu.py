"""The scan on the CPU: the reference that the CUDA kernels must equal, token for token."""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.cuda import places
from freedraft.retrieval.cuda.rules import Rules, checked_batch
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64

PLACES = places.PLACES
sequence_length = kernel(places.sequence_length)
match_length = kernel(places.match_length)
keep_place = kernel(places.keep_place)
vote = kernel(places.vote)


def draft_on_cpu(
    tokens: Int32,
    lengths: Int32,
    rows: Int64,
    active: Int32,
    drafts: Int64,
    probability: Float32,
    counts: Int32,
    rules: Rules,
) -> None:
    """Draft for every row of a batch; the arguments are those of `DeviceScan.draft`, in host memory.

    Costs a pass over each sequence, most recent token first.

    Raises:
        InputError: shapes or types that do not fit one another.
    """
    checked_batch(tokens, lengths, rows, active, drafts, probability, counts)
    _draft_rows(
        tokens,
        lengths,
        rows,
        active,
        drafts,
        probability,
        counts,
        (rules.longest, rules.shortest, rules.limit(drafts.shape[1])),
        # Rounded as on the device.
        float(np.float32(rules.least)),
    )


@kernel
def _draft_rows(
    tokens: Int32,
    lengths: Int32,
    rows: Int64,
    active: Int32,
    drafts: Int64,
    probability: Float32,
    counts: Int32,
    limits: tuple[int, int, int],
    least: float,
) -> None:
    longest, shortest, budget = limits
    keys = np.zeros(PLACES, np.int64)
    following = np.zeros(PLACES, np.int64)
    for row in range(len(rows)):
        slot = rows[row]
        length = sequence_length(tokens, lengths, slot)
        keys[:] = 0
        newest = length - 1 if active[row] > 0 else 0
        for position in range(newest, 0, -1):
            # More recent places came first: an equally long match is no better than those that are kept.
            kept = keys[PLACES - 1] >> 32
            if kept >= longest:
                break
            if position <= kept or tokens[slot, position - 1 - kept] != tokens[slot, length - 1 - kept]:
                continue
            matched = match_length(tokens, slot, length, position, longest)
            if matched >= shortest and matched > kept:
                keep_place(keys, (matched << 32) | position)
        # A slot out of bounds has no tokens, so none of slot 0 is read for it.
        text = tokens[slot if length > 0 else 0]
        counts[row] = vote(text, length, keys, following, budget, least, drafts[row], probability[row])

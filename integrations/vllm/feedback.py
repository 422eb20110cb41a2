"""What verification showed of each sequence's draft, in the numbering of the drafter's own draft."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from freedraft.integrations.vllm.last_drafts import Notes
from freedraft.integrations.vllm.tap import Ranked
from freedraft.plugins.base import Feedback, FeedbackKind
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

NOT_VERIFIED = -1


def ranked_feedback(
    wanted: frozenset[FeedbackKind],
    ranked: Ranked,
    notes: Notes,
    ready: NDArray[np.bool_],
    sequences: Int64,
    previous: Int64,
    length: Int32,
    new: Int64,
) -> tuple[Int64, Feedback]:
    """What to tell the drafter of the last step, and of which sequences.

    Nothing is told of a row that was in its prompt, that was not seen in the step before, or whose text the drafter had
    not got as a whole.

    Args:
        wanted: what the drafter asked for.
        ranked: what the target ranked high, by row.
        notes: the drafts of the last step.
        ready: bool, by sequence, whether the drafter had its whole text then.
        sequences: int64 `(rows,)`, -1 = none.
        previous: int64 `(rows,)`, each row's length in the last call, 0 = it is new.
        length: int32 `(rows or more,)`, its length now.
        new: int64 `(rows,)`, tokens of the last step.
    """
    who, accepted, offsets, top_k = _feedback(
        ranked.top_k, ranked.offsets, notes, ready, sequences, previous, length, new
    )
    return who, Feedback(
        accepted,
        offsets,
        np.ascontiguousarray(top_k[:, 0]) if "argmax" in wanted else None,
        top_k if "top_k" in wanted else None,
    )


@kernel
def _feedback(
    ranked: Int32,
    positions: Int64,
    notes: Notes,
    ready: NDArray[np.bool_],
    sequences: Int64,
    previous: Int64,
    length: Int32,
    new: Int64,
) -> tuple[Int64, Int32, Int64, Int32]:
    rows = len(sequences)
    who = np.empty(rows, np.int64)
    at_row = np.empty(rows, np.int64)
    accepted = np.empty(rows, np.int32)
    offsets = np.zeros(rows + 1, np.int64)
    count = 0
    for i in range(rows):
        sequence = sequences[i]
        shown = positions[i + 1] - positions[i]
        if sequence < 0 or not ready[sequence] or new[i] == 0 or previous[i] + new[i] != length[i] or new[i] > shown:
            continue
        if previous[i] == 0 or shown - 1 > notes.given[sequence] + notes.filled[sequence]:
            continue
        who[count] = sequence
        at_row[count] = i
        accepted[count] = min(new[i] - 1, notes.given[sequence])
        # Of a draft of which nothing was verified only the first entry is told.
        offsets[count + 1] = offsets[count] + 1 + (notes.asked[sequence] if shown > 1 else 0)
        count += 1
    told = np.full((offsets[count], ranked.shape[1]), NOT_VERIFIED, np.int32)
    for j in range(count):
        first = positions[at_row[j]]
        told[offsets[j]] = ranked[first]
        shown = min(positions[at_row[j] + 1] - first - 1, notes.given[who[j]])
        for k in range(shown):
            told[offsets[j] + 1 + notes.node[who[j], k]] = ranked[first + 1 + k]
    return who[:count], accepted[:count], offsets[: count + 1], told

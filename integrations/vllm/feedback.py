"""What verification showed of each sequence's draft, in the numbering of the drafter's own draft."""

from __future__ import annotations

import numpy as np

from freedraft.integrations.vllm.tap import Ranked
from freedraft.plugins.base import Feedback, FeedbackKind
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

NOT_VERIFIED = -1


class Asked:
    """Remembers which nodes of what a drafter drafted became the chain that vLLM was given.

    Args:
        sequences: room for so many.
        longest: nodes of a draft, at most.
    """

    def __init__(self, sequences: int, longest: int) -> None:
        self._size = np.zeros(sequences, np.int64)
        self._nodes = np.zeros((sequences, longest), np.int32)

    def note(self, sequences: Int64, asked: Int64, nodes: Int32, offsets: Int64) -> None:
        """Remember drafts, one for each of `sequences`.

        Args:
            sequences: int64 `(n,)`.
            asked: int64 `(n + 1,)`, offsets of what was drafted.
            nodes: int32 `(t,)`, for each token of the chains the node that it was in its row of the draft.
            offsets: int64 `(n + 1,)`, of the chains.
        """
        _note(sequences, asked, nodes, offsets, self._size, self._nodes)

    def feedback(
        self,
        wanted: frozenset[FeedbackKind],
        ranked: Ranked,
        sequences: Int64,
        previous: Int64,
        length: Int32,
        new: Int64,
    ) -> tuple[Int64, Feedback]:
        """What to tell the drafter of the last step, and of which sequences; forgets the drafts.

        Nothing is told of a row that was in its prompt, or that was not seen in the step before.

        Args:
            wanted: what the drafter asked for.
            ranked: what the target ranked high, by row.
            sequences: int64 `(rows,)`, -1 = none.
            previous: int64 `(rows,)`, each row's length in the last call, 0 = it is new.
            length: int32 `(rows or more,)`, its length now.
            new: int64 `(rows,)`, tokens of the last step.
        """
        who, accepted, offsets, top_k = _feedback(
            ranked.top_k, ranked.offsets, sequences, previous, length, new, self._size, self._nodes
        )
        return who, Feedback(
            accepted,
            offsets,
            np.ascontiguousarray(top_k[:, 0]) if "argmax" in wanted else None,
            top_k if "top_k" in wanted else None,
        )


@kernel
def _note(sequences: Int64, asked: Int64, nodes: Int32, offsets: Int64, size: Int64, kept: Int32) -> None:
    for i in range(len(sequences)):
        size[sequences[i]] = asked[i + 1] - asked[i]
        for j in range(offsets[i + 1] - offsets[i]):
            kept[sequences[i], j] = nodes[offsets[i] + j]


@kernel
def _feedback(
    ranked: Int32,
    positions: Int64,
    sequences: Int64,
    previous: Int64,
    length: Int32,
    new: Int64,
    size: Int64,
    nodes: Int32,
) -> tuple[Int64, Int32, Int64, Int32]:
    rows = len(sequences)
    who = np.empty(rows, np.int64)
    accepted = np.empty(rows, np.int32)
    offsets = np.zeros(rows + 1, np.int64)
    count = 0
    for i in range(rows):
        sequence = sequences[i]
        shown = positions[i + 1] - positions[i]
        if sequence < 0 or previous[i] == 0 or new[i] == 0 or previous[i] + new[i] != length[i] or new[i] > shown:
            continue
        if shown - 1 > size[sequence]:
            continue
        who[count] = sequence
        accepted[count] = new[i] - 1
        # Of a draft of which nothing was verified only the first entry is told.
        offsets[count + 1] = offsets[count] + 1 + (size[sequence] if shown > 1 else 0)
        count += 1
    told = np.full((offsets[count], ranked.shape[1]), NOT_VERIFIED, np.int32)
    at = 0
    for i in range(rows):
        if at == count or sequences[i] != who[at]:
            continue
        first = positions[i]
        told[offsets[at]] = ranked[first]
        for j in range(positions[i + 1] - first - 1):
            told[offsets[at] + 1 + nodes[who[at], j]] = ranked[first + 1 + j]
        at += 1
    size[:] = 0
    return who[:count], accepted[:count], offsets[: count + 1], told

"""What verification showed, in the numbering of the drafter's own draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from freedraft.integrations.hf.draft import Draft
from freedraft.plugins.base import Drafts, Feedback
from freedraft.retrieval.ragged import Int32

NOT_VERIFIED = -1


def of_all_nodes(feedback: Feedback, verified: Draft, asked: Drafts, row: int) -> Feedback:
    """`feedback` on what was verified, as feedback on all that the drafter drafted.

    A draft is cut before it is verified: to what pays, to one branch, or before a token that would end the text. What
    was not verified has -1 for its argmax and its top-k.

    Args:
        feedback: on one sequence; its entries are the nodes of `verified`.
        verified: what was verified, a part of what was drafted.
        asked: what was drafted, for all sequences.
        row: which of them.
    """
    part = asked.row(row)
    nodes = part.stop - part.start
    if len(verified.tokens) == nodes:
        return feedback
    # Of siblings with one token the first stands for all: behind the same text the target says the same.
    first: dict[tuple[int, int], int] = {}
    stands = [0]
    for parent, token in zip((asked.parents[part] + 1).tolist(), asked.tokens[part].tolist(), strict=True):
        stands.append(first.setdefault((stands[parent], token), len(stands)))
    entries = [0]
    for parent, token in zip(verified.parents, verified.tokens, strict=True):
        entries.append(first[entries[parent], token])
    return Feedback(
        feedback.accepted,
        np.array([0, 1 + nodes], np.int64),
        _spread(feedback.argmax, entries, stands),
        _spread(feedback.top_k, entries, stands),
    )


def _spread(values: Int32 | None, entries: Sequence[int], stands: Sequence[int]) -> Int32 | None:
    if values is None:
        return None
    spread = np.full((len(stands), *values.shape[1:]), NOT_VERIFIED, np.int32)
    spread[entries] = values
    return spread[stands]


def together(rows: Sequence[Feedback]) -> Feedback:
    """One `Feedback` for several sequences."""
    if len(rows) == 1:
        return rows[0]
    argmax = [row.argmax for row in rows if row.argmax is not None]
    top_k = [row.top_k for row in rows if row.top_k is not None]
    return Feedback(
        accepted=np.concatenate([row.accepted for row in rows]),
        offsets=np.cumsum([0, *(int(row.offsets[-1]) for row in rows)]),
        argmax=np.concatenate(argmax) if argmax else None,
        top_k=np.concatenate(top_k) if top_k else None,
    )

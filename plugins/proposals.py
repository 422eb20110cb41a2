"""What other drafters propose, as evidence: fusion learns how far to believe each of them.

A proposal is a draft, a tree, that stays valid while what is drafted, or committed, goes down it. The children of the
node reached there are candidates; how probable their drafter holds them is for the mixer to judge.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins.adjacency import NO_TOKEN
from freedraft.plugins.evidence import KIND, LATEST, LIKELIEST, MATCHED, NO_STATE, PLACE, PROPOSED, SEEN, TEXT, TIMES
from freedraft.plugins.mixing import SEENS, SHARES
from freedraft.plugins.verified import NO_CHILD, child_with
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64

MOST_DRAFTERS = 4  # no more than there are buckets for the counts of a text's contexts, which tell them apart
CHILDREN = 3  # of a place, the first ones, that become candidates

ROOT = -1
LOST = NO_CHILD

# Columns of a cursor: the node of the proposal, `ROOT` or `LOST`; and how many tokens lie behind the committed text.
NODE, DEPTH = 0, 1


class Proposals(NamedTuple):
    """The newest draft of each of S other drafters, for each slot, of M nodes at most.

    Attributes:
        tokens: int32 `(slots, S, M)`.
        parents: int32, likewise; -1 = the committed text.
        share: int32, likewise: the share bucket of the probability of each node where its parent is right.
        nodes: int32 `(slots, S)`, how many there are; 0 where the last draft is used up.
    """

    tokens: Int32
    parents: Int32
    share: Int32
    nodes: Int32


def no_proposals(drafters: int, longest: int) -> Proposals:
    """Room for no sequence, with drafts of up to `longest` nodes."""
    shape = (0, drafters, longest)
    return Proposals(
        np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    )


@kernel
def keep_proposals(
    proposals: Proposals,
    which: int,
    slots: Int64,
    tokens: Int32,
    parents: Int32,
    probability: Float32,
    offsets: Int64,
) -> None:
    """Keep a ragged batch of drafts of drafter `which`, the first nodes of each."""
    for row in range(len(slots)):
        slot, first = slots[row], offsets[row]
        nodes = min(offsets[row + 1] - first, proposals.tokens.shape[2])
        proposals.nodes[slot, which] = nodes
        for node in range(nodes):
            parent = parents[first + node]
            before = probability[first + parent] if parent >= 0 else np.float32(1.0)
            alone = probability[first + node] / max(before, np.float32(1e-9))
            bucket = 1
            while bucket < len(SHARES) - 1 and alone > SHARES[bucket]:
                bucket += 1
            proposals.tokens[slot, which, node] = tokens[first + node]
            proposals.parents[slot, which, node] = parent
            proposals.share[slot, which, node] = bucket


@kernel
def to_start(proposals: Proposals, slot: int, at: Int64) -> None:
    """Set cursors, int64 `(S, 2)`, to the committed text that the proposals follow."""
    for which in range(len(at)):
        at[which, NODE] = ROOT if proposals.nodes[slot, which] > 0 else LOST
        at[which, DEPTH] = 0


@kernel
def follow_proposals(proposals: Proposals, slot: int, at: Int64, token: int) -> None:
    """Move the cursors past a token; one whose proposal has it not is lost."""
    for which in range(len(at)):
        place = at[which, NODE]
        if place != LOST:
            tokens, parents = proposals.tokens[slot, which], proposals.parents[slot, which]
            at[which, NODE] = child_with(tokens, parents, proposals.nodes[slot, which], place, token)
            at[which, DEPTH] += 1


@kernel
def gather_proposals(proposals: Proposals, slot: int, at: Int64, evidence: Int64, rows: int) -> int:
    """Add what is proposed at the cursors to `evidence`, after its first `rows`; return how many there are."""
    for which in range(len(at)):
        place, children = at[which, NODE], 0
        if place == LOST:
            continue
        for node in range(place + 1, proposals.nodes[slot, which]):
            if rows == len(evidence) or children == CHILDREN:
                break
            if proposals.parents[slot, which, node] == place:
                evidence[rows, KIND] = PROPOSED
                evidence[rows, MATCHED] = 1 + at[which, DEPTH]
                evidence[rows, SEEN] = SEENS[which]
                evidence[rows, LIKELIEST] = proposals.tokens[slot, which, node]
                evidence[rows, TIMES] = proposals.share[slot, which, node]
                evidence[rows, LATEST] = NO_TOKEN
                evidence[rows, PLACE] = NO_STATE
                evidence[rows, TEXT] = which
                children += 1
                rows += 1
    return rows

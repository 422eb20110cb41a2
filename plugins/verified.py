"""What was verified of a draft: which nodes a runtime's feedback is about, and where a text goes down its tree."""

from __future__ import annotations

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32

FOLLOWED = 64
"""Nodes of a draft that is not its own, the first ones, that a drafter follows."""


NO_CHILD = -2


@kernel
def child_with(tokens: Int32, parents: Int32, nodes: int, parent: int, token: int) -> int:
    """The first child of node `parent`, -1 = the text's end, that has this token; `NO_CHILD` where none has."""
    for child in range(parent + 1, nodes):
        if parents[child] == parent and tokens[child] == token:
            return child
    return NO_CHILD


@kernel
def known_positions(told: int, parents: Int32, nodes: int) -> int:
    """How many of `told` verified positions belong to known nodes of a draft of `nodes` nodes, 1 for the text's end.

    A chain may have been cut at its end. Of a tree with too few positions nobody knows which nodes these are.
    """
    if told < nodes + 1:
        for node in range(nodes):
            if parents[node] != node - 1:
                return min(told, 1)
    return min(told, nodes + 1)

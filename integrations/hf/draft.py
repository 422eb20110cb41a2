"""A draft of one sequence in the shape that a forward pass verifies it: a chain or a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from freedraft.plugins.base import Drafts


@dataclass(frozen=True, slots=True)
class Chain:
    """A draft with one branch.

    Nodes are numbered as positions of the forward pass: 0 is the last committed token, `1 + j` is draft token j.
    """

    tokens: list[int]

    @property
    def width(self) -> int:
        """Positions of the forward pass that verifies it."""
        return 1 + len(self.tokens)

    @property
    def depths(self) -> list[int]:
        """How many tokens each node is behind node 0."""
        return list(range(self.width))

    @property
    def parents(self) -> Sequence[int]:
        """For each draft token the node that it follows."""
        return range(len(self.tokens))

    def ancestors(self) -> NDArray[np.bool_]:
        """Bool `(width, width)`: row i marks node i and the nodes that it follows."""
        return np.tri(self.width, dtype=np.bool_)

    def path(self, node: int) -> Sequence[int]:
        """The nodes from 0 to `node`."""
        return range(node + 1)

    def drafted(self, node: int) -> list[int]:
        """The draft tokens that follow `node`."""
        return self.tokens[node : node + 1]

    def child(self, node: int, token: int) -> int | None:
        """The node of draft token `token` behind `node`, None when it was not drafted."""
        return node + 1 if node < len(self.tokens) and self.tokens[node] == token else None

    def before(self, ends: frozenset[int]) -> Chain:
        """The draft up to the first token of `ends`, without it: the target gives that one for nothing."""
        for i, token in enumerate(self.tokens):
            if token in ends:
                return Chain(self.tokens[:i])
        return self


class Tree:
    """A draft with several branches.

    Nodes are numbered as those of a `Chain`.

    Args:
        tokens: the draft tokens, parents first.
        parents: for each draft token the node that it follows, 0 = the last committed token.

    Attributes:
        depths: how many tokens each node is behind node 0.
    """

    def __init__(self, tokens: list[int], parents: list[int]) -> None:
        self.tokens = tokens
        self.depths = [0]
        self._parents = [-1, *parents]
        self._children: list[list[int]] = [[] for _ in self._parents]
        for node, parent in enumerate(parents, start=1):
            self.depths.append(self.depths[parent] + 1)
            self._children[parent].append(node)

    @property
    def width(self) -> int:
        """Positions of the forward pass that verifies it."""
        return len(self._parents)

    @property
    def parents(self) -> Sequence[int]:
        """For each draft token the node that it follows."""
        return self._parents[1:]

    def ancestors(self) -> NDArray[np.bool_]:
        """Bool `(width, width)`: row i marks node i and the nodes that it follows."""
        marks = np.eye(self.width, dtype=np.bool_)
        for node in range(1, self.width):
            marks[node] |= marks[self._parents[node]]
        return marks

    def path(self, node: int) -> Sequence[int]:
        """The nodes from 0 to `node`."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(self._parents[nodes[-1]])
        return nodes[::-1]

    def drafted(self, node: int) -> list[int]:
        """The draft tokens that follow `node`."""
        return [self.tokens[child - 1] for child in self._children[node]]

    def child(self, node: int, token: int) -> int | None:
        """The node of draft token `token` behind `node`, None when it was not drafted."""
        for child in self._children[node]:
            if self.tokens[child - 1] == token:
                return child
        return None

    def before(self, ends: frozenset[int]) -> Draft:
        """The draft without the tokens of `ends` and what follows them: the target gives those for nothing."""
        if ends.isdisjoint(self.tokens):
            return self
        kept = {0: 0}
        for node in range(1, self.width):
            if self.tokens[node - 1] not in ends and self._parents[node] in kept:
                kept[node] = len(kept)
        nodes = list(kept)[1:]
        return shaped([self.tokens[node - 1] for node in nodes], [kept[self._parents[node]] for node in nodes])


Draft = Chain | Tree
NO_DRAFT = Chain([])


def shaped(tokens: list[int], parents: list[int]) -> Draft:
    """A `Chain` where there is one branch only, for it needs no mask; else a `Tree`."""
    return Chain(tokens) if parents == list(range(len(parents))) else Tree(tokens, parents)


def as_draft(drafts: Drafts, row: int = 0) -> Draft:
    """Row `row` as it was drafted."""
    part = drafts.row(row)
    return shaped(drafts.tokens[part].tolist(), (drafts.parents[part] + 1).tolist())

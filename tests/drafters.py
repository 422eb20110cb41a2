"""Small drafters in plain Python that keep the contract of `plugins.base`, or break it on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from freedraft.plugins.base import Drafts, Feedback
from freedraft.plugins.config import DrafterSettings


def chain(tokens: Sequence[int]) -> Drafts:
    """One row that drafts `tokens` in a chain."""
    return chains([tokens])


def chains(rows: Sequence[Sequence[int]]) -> Drafts:
    """A row a chain."""
    lengths = [len(row) for row in rows]
    total = sum(lengths)
    return Drafts(
        np.array([token for row in rows for token in row], np.int32),
        np.array([i - 1 for n in lengths for i in range(n)], np.int32),
        np.array([0.9 ** (i + 1) for n in lengths for i in range(n)], np.float32),
        np.zeros(total, np.uint8),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def tree(nodes: Sequence[tuple[int, int]]) -> Drafts:
    """One row with a `(token, parent)` a node, the parent -1 being the committed text."""
    return trees([nodes])


def trees(rows: Sequence[Sequence[tuple[int, int]]]) -> Drafts:
    """A row a tree, its branches all the likelier the earlier they are listed."""
    nodes = [node for row in rows for node in row]
    probability = []
    for row in rows:
        start = len(probability)
        for i, (_, parent) in enumerate(row):
            above = 1.0 if parent < 0 else probability[start + parent]
            probability.append(above * (1.0 - 0.5 * (i + 1) / (len(row) + 1)))
    return Drafts(
        np.array([token for token, _ in nodes], np.int32),
        np.array([parent for _, parent in nodes], np.int32),
        np.array(probability, np.float32),
        np.zeros(len(nodes), np.uint8),
        np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
    )


def of_nodes(rows: Sequence[Sequence[tuple[int, float]]]) -> Drafts:
    """A row a tree of `(parent, probability)` a node; tokens and sources count up, so that each node is known again."""
    nodes = [node for row in rows for node in row]
    return Drafts(
        np.arange(10, 10 + len(nodes), dtype=np.int32),
        np.array([parent for parent, _ in nodes], np.int32),
        np.array([chance for _, chance in nodes], np.float32),
        np.arange(len(nodes), dtype=np.uint8),
        np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
    )


class Scripted:
    """Drafts what `propose(text, budget)` says, and remembers all it was told.

    Attributes:
        texts: slot -> committed text.
        closed: the text of every closed sequence.
        calls: (method, details) in order.
    """

    Settings: ClassVar[type[DrafterSettings]] = DrafterSettings
    feedback: ClassVar[frozenset[Any]] = frozenset()

    def __init__(self, propose: Callable[[list[int], int], Sequence[int]] = lambda text, budget: []) -> None:
        self.propose = propose
        self.texts: dict[int, list[int]] = {}
        self.closed: list[list[int]] = []
        self.calls: list[tuple[str, Any]] = []
        self._next = 7

    def open(self, prompts: Any, offsets: Any) -> Any:
        slots = np.arange(self._next, self._next + len(offsets) - 1)
        self._next += len(slots)
        for i, slot in enumerate(slots.tolist()):
            self.texts[slot] = prompts[offsets[i] : offsets[i + 1]].tolist()
        self.calls.append(("open", [self.texts[s] + [] for s in slots.tolist()]))
        return slots

    def extend(self, slots: Any, tokens: Any, offsets: Any) -> None:
        for i, slot in enumerate(slots.tolist()):
            self.texts[slot] += tokens[offsets[i] : offsets[i + 1]].tolist()
        self.calls.append(("extend", tokens.tolist()))

    def draft(self, slots: Any, budget: Any) -> Drafts:
        assert len(slots) == len(budget)
        rows = [list(self.propose(self.texts[s], int(b))) for s, b in zip(slots.tolist(), budget, strict=True)]
        self.calls.append(("draft", budget.tolist()))
        return chains(rows)

    def observe(self, slots: Any, feedback: Feedback) -> None:
        assert [len(slots) + 1] == list(feedback.offsets.shape)
        self.calls.append(("observe", feedback))

    def close(self, slots: Any) -> None:
        self.closed += [self.texts.pop(slot) for slot in slots.tolist()]
        self.calls.append(("close", len(slots)))


def never() -> Scripted:
    """Drafts nothing."""
    return Scripted()


def truth(text: Sequence[int]) -> Scripted:
    """Drafts what `text`, prompt and output, has next."""
    return Scripted(lambda so_far, budget: list(text[len(so_far) : len(so_far) + budget]))


def half_true(text: Sequence[int], vocabulary: int, seed: int = 0) -> Scripted:
    """Drafts what `text` has next, but each token is wrong with a chance of one in four."""
    dice = random.Random(seed)

    def propose(so_far: list[int], budget: int) -> list[int]:
        following = list(text[len(so_far) : len(so_far) + budget])
        return [dice.randrange(vocabulary) if dice.random() < 0.25 else token for token in following]

    return Scripted(propose)


def noise(vocabulary: int, length: int = 5, seed: int = 0) -> Scripted:
    """Drafts random tokens."""
    dice = random.Random(seed)
    return Scripted(lambda text, budget: [dice.randrange(vocabulary) for _ in range(min(length, budget))])


def copying(length: int = 8, ngram: int = 2) -> Scripted:
    """Drafts what followed the last n-gram when it last occurred: prompt lookup."""

    def propose(text: list[int], budget: int) -> list[int]:
        for start in range(len(text) - ngram - 1, -1, -1):
            if text[start : start + ngram] == text[-ngram:]:
                return text[start + ngram : start + ngram + min(length, budget)]
        return []

    return Scripted(propose)


class Branching(Scripted):
    """Drafts the tree that `grow(text, budget)` says, as `(token, parent)` a node."""

    def __init__(self, grow: Callable[[list[int], int], Sequence[tuple[int, int]]]) -> None:
        super().__init__()
        self.grow = grow

    def draft(self, slots: Any, budget: Any) -> Drafts:
        rows = [self.grow(self.texts[s], int(b)) for s, b in zip(slots.tolist(), budget, strict=True)]
        self.calls.append(("draft", budget.tolist()))
        return trees(rows)


def true_branch(text: Sequence[int], vocabulary: int, seed: int = 0, depth: int = 4) -> Branching:
    """Drafts trees with what `text` has next in one branch at a random place, and noise in the others."""
    dice = random.Random(seed)

    def grow(so_far: list[int], budget: int) -> list[tuple[int, int]]:
        following = list(text[len(so_far) : len(so_far) + depth])
        nodes: list[tuple[int, int]] = []
        true_node = -1
        for token in following:
            siblings = [dice.randrange(vocabulary) for _ in range(dice.randrange(3))]
            parent = true_node
            place = dice.randrange(len(siblings) + 1)
            for i, other in enumerate([*siblings[:place], token, *siblings[place:]]):
                nodes.append((other, parent))
                if i == place:
                    true_node = len(nodes) - 1
            # A child of a wrong sibling, which must never be seen by the true branch.
            nodes.append((dice.randrange(vocabulary), dice.randrange(len(nodes))))
        return nodes[:budget]

    return Branching(grow)


def random_trees(vocabulary: int, size: int = 12, seed: int = 0) -> Branching:
    """Drafts trees of random tokens and shapes; with a small vocabulary some tokens come true."""
    dice = random.Random(seed)

    def grow(so_far: list[int], budget: int) -> list[tuple[int, int]]:
        count = min(budget, dice.randrange(size + 1))
        return [(dice.randrange(vocabulary), dice.randrange(-1, i)) for i in range(count)]

    return Branching(grow)


class Raising(Scripted):
    """A drafter that raises at random in any method, the methods in `spared` excepted."""

    def __init__(self, inner: Scripted, chance: float, seed: int = 0, spared: Sequence[str] = ()) -> None:
        super().__init__(inner.propose)
        self._chance = chance
        self._dice = random.Random(seed)
        self._spared = spared
        self.raised = 0

    def _perhaps(self, method: str) -> None:
        if method not in self._spared and self._dice.random() < self._chance:
            self.raised += 1
            raise RuntimeError(f"{method} failed on purpose")

    def open(self, prompts: Any, offsets: Any) -> Any:
        self._perhaps("open")
        return super().open(prompts, offsets)

    def extend(self, slots: Any, tokens: Any, offsets: Any) -> None:
        self._perhaps("extend")
        super().extend(slots, tokens, offsets)

    def draft(self, slots: Any, budget: Any) -> Drafts:
        self._perhaps("draft")
        return super().draft(slots, budget)

    def close(self, slots: Any) -> None:
        self._perhaps("close")
        super().close(slots)


class Malformed(Scripted):
    """A drafter whose drafts break the contract: `build(budget)` makes them."""

    def __init__(self, build: Callable[[int], Any]) -> None:
        super().__init__()
        self._build = build

    def draft(self, slots: Any, budget: Any) -> Any:
        return self._build(int(budget[0]))


MALFORMED: dict[str, Callable[[int], Any]] = {
    "more than the budget": lambda budget: chain([1] * (budget + 1)),
    "negative": lambda budget: chain([-1]),
    "the highest number": lambda budget: chain([2**31 - 1]),
    "none": lambda budget: None,
    "a list": lambda budget: [1, 2, 3],
    "too many rows": lambda budget: chains([[1], [2]]),
    "no row": lambda budget: Drafts.empty(0),
    "offsets beyond the end": lambda budget: _with(chain([1]), offsets=np.array([0, 2], np.int64)),
    "falling offsets": lambda budget: _with(chain([1]), offsets=np.array([1, 1], np.int64)),
    "float tokens": lambda budget: _with(chain([1]), tokens=np.array([1.0], np.float32)),
    "a node that is its own parent": lambda budget: _with(chain([1]), parents=np.array([0], np.int32)),
    "a parent below -1": lambda budget: _with(chain([1]), parents=np.array([-2], np.int32)),
    "parents too short": lambda budget: _with(chain([1]), parents=np.empty(0, np.int32)),
    "a probability that is none": lambda budget: _with(chain([1]), probability=np.array([np.nan], np.float32)),
    "an infinite probability": lambda budget: _with(chain([1]), probability=np.array([np.inf], np.float32)),
    "objects as probability": lambda budget: _with(chain([1]), probability=np.array([None], object)),
    "objects as source": lambda budget: _with(chain([1]), source=np.array(["text"], object)),
    "long probabilities": lambda budget: _with(chain([1]), probability=np.array([0.5], np.longdouble)),
    "long sources": lambda budget: _with(chain([1]), source=np.array([300], np.int64)),
    "float offsets": lambda budget: _with(chain([1]), offsets=np.array([0.0, 1.0])),
    "no probability": lambda budget: _with(chain([1]), probability=np.empty(0, np.float32)),
}


def _with(drafts: Drafts, **changes: Any) -> Drafts:
    parts = {name: getattr(drafts, name) for name in ("tokens", "parents", "probability", "source", "offsets")}
    return Drafts(**{**parts, **changes})

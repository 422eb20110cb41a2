"""A target that is a table of rankings, and a decoding loop around it: drafters without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from freedraft.integrations.guard import Guard
from freedraft.plugins.base import Drafter, Drafts, Feedback
from freedraft.retrieval.ragged import ragged


class RankingTarget:
    """Ranks all tokens after a text by its last `order` tokens, at random but always the same way.

    Args:
        sure: the share of cases in which the first of the ranking is committed, else any of the first four; 1 = greedy.
    """

    def __init__(self, seed: int, vocabulary: int = 12, order: int = 2, sure: float = 1.0) -> None:
        self.vocabulary = vocabulary
        self._seed, self._order, self._sure = seed, order, sure
        self._known: dict[tuple[int, ...], list[int]] = {}

    def ranking(self, text: Sequence[int]) -> list[int]:
        context = tuple(text[-self._order :])
        if context not in self._known:
            tokens = list(range(self.vocabulary))
            random.Random(f"{self._seed} {context}").shuffle(tokens)
            self._known[context] = tokens
        return self._known[context]

    def choice(self, text: Sequence[int]) -> int:
        """What is committed after `text`."""
        dice = random.Random(f"{self._seed} {self._sure} {list(text)}")
        return self.ranking(text)[0 if dice.random() < self._sure else dice.randrange(4)]

    def reply(self, prompt: Sequence[int], length: int) -> list[int]:
        """What plain decoding gives."""
        text = list(prompt)
        while len(text) < len(prompt) + length:
            text.append(self.choice(text))
        return text[len(prompt) :]


class Decoding:
    """Several sequences of one drafter, decoded side by side.

    Attributes:
        texts: what is committed, a list a sequence.
        drafts: the last drafts, as lists of (token, parent) a sequence.
        probability: theirs.
        outcomes: [probability, accepted] of every draft token whose parent was accepted, and of its parent.
        passes: verified drafts, a sequence counting one.
    """

    def __init__(self, drafter: Drafter, target: RankingTarget, prompts: Sequence[Sequence[int]], k: int = 8) -> None:
        self.guard = Guard(drafter)
        self.target = target
        self.texts = [list(prompt) for prompt in prompts]
        self.prompts = [list(prompt) for prompt in prompts]
        self.slots = self.guard.open(*ragged(prompts))
        self.drafts: list[list[tuple[int, int]]] = []
        self.probability: list[list[float]] = []
        self.outcomes: list[tuple[float, bool]] = []
        self.passes = 0
        self._k = k

    @property
    def tokens_per_step(self) -> float:
        new = sum(len(text) - len(prompt) for text, prompt in zip(self.texts, self.prompts, strict=True))
        return new / self.passes

    def step(self, budget: int) -> tuple[list[Feedback], list[list[int]]]:
        """Draft, verify, and tell the drafter; return what it was told, a `Feedback` and the new tokens a sequence."""
        drafts = self.guard.draft(self.slots, np.full(len(self.texts), budget, np.int32), self.target.vocabulary)
        self.drafts = [_nodes(drafts, row) for row in range(drafts.rows)]
        self.probability = [drafts.probability[drafts.row(row)].tolist() for row in range(drafts.rows)]
        told, committed = [], []
        for text, nodes, likelihood in zip(self.texts, self.drafts, self.probability, strict=True):
            feedback, new = self._verify(text, nodes, likelihood)
            told.append(feedback)
            committed.append(new)
            text += new
            self.passes += 1
        self.guard.observe(self.slots, _joined(told))
        self.guard.extend(self.slots, *ragged(committed))
        assert self.guard.errors == 0
        return told, committed

    def run(self, length: int, budget: int) -> None:
        """Step until every sequence has `length` new tokens, and hold them against plain decoding."""
        while min(len(t) - len(p) for t, p in zip(self.texts, self.prompts, strict=True)) < length:
            self.step(budget)
        for text, prompt in zip(self.texts, self.prompts, strict=True):
            assert text[len(prompt) :] == self.target.reply(prompt, len(text) - len(prompt))

    def _verify(
        self, text: list[int], nodes: list[tuple[int, int]], likelihood: list[float]
    ) -> tuple[Feedback, list[int]]:
        paths: list[list[int]] = []
        for token, parent in nodes:
            paths.append([*(paths[parent] if parent >= 0 else []), token])
        assert len({tuple(path) for path in paths}) == len(paths), "a node twice"
        ranked = np.array([self.target.ranking(text + path)[: self._k] for path in [[], *paths]], np.int32)
        new: list[int] = []
        node: int | None = -1
        while node is not None:
            at = likelihood[node] if node >= 0 else 1.0
            new.append(self.target.choice(text + new))
            children = [i for i, (_, parent) in enumerate(nodes) if parent == node]
            self.outcomes += [(likelihood[i] / at, nodes[i][0] == new[-1]) for i in children]
            node = next((i for i in children if nodes[i][0] == new[-1]), None)
        accepted = np.array([len(new) - 1], np.int32)
        return Feedback(accepted, np.array([0, len(ranked)]), ranked[:, 0].copy(), ranked), new


def _nodes(drafts: Drafts, row: int) -> list[tuple[int, int]]:
    part = drafts.row(row)
    return list(zip(drafts.tokens[part].tolist(), drafts.parents[part].tolist(), strict=True))


def _joined(parts: list[Feedback]) -> Feedback:
    def joined(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    lengths = [part.offsets[-1] for part in parts]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Feedback(joined("accepted"), offsets, joined("argmax"), joined("top_k"))

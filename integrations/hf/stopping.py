"""Stopping criteria, asked after every committed token as in plain decoding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria


class Stopping:
    """The stopping criteria of a call.

    transformers' own criteria for length and end of sequence are read once and then decided without a tensor
    operation, which saves a device synchronisation a token; all others are called, each of them after each token.

    Attributes:
        max_length: tokens of prompt and output together; None = unbounded.
        ends: token ids after which generation always stops.
    """

    def __init__(self, criteria: Iterable[StoppingCriteria]) -> None:
        self.max_length: int | None = None
        self.ends: frozenset[int] = frozenset()
        self._others: list[StoppingCriteria] = []
        for criterion in criteria:
            # Exact types: a subclass may have changed what is asked.
            if type(criterion) is MaxLengthCriteria:
                length = int(criterion.max_length)
                self.max_length = length if self.max_length is None else min(self.max_length, length)
            elif type(criterion) is EosTokenCriteria:
                self.ends |= frozenset(criterion.eos_token_id.flatten().tolist())
            else:
                self._others.append(criterion)

    def __call__(self, token: int, committed: torch.Tensor, scores: tuple[torch.Tensor, ...] | None) -> bool:
        """Whether to stop, `token` having been committed last.

        Args:
            token: the last token of `committed`.
            committed: int64 `(1, length)`.
            scores: one float32 `(1, vocabulary)` a generated token, None where they are not collected.
        """
        done = token in self.ends or (self.max_length is not None and committed.shape[1] >= self.max_length)
        for criterion in self._others:
            # No short cut: a criterion may count its calls.
            answer = criterion(committed, scores)
            done |= answer if isinstance(answer, bool) else bool(answer.all())
        return done

    def room(self, length: int, most: int) -> int:
        """How many draft tokens can still become text, `length` tokens being committed; at most `most`.

        The target adds a token of its own after the last accepted one, so that one is left for it.
        """
        return most if self.max_length is None else max(0, min(most, self.max_length - length - 1))

"""Acceptance rules: which token the target commits at a position, given what was drafted there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class AcceptanceRule(Protocol):
    """Chooses the token at a position; a draft token is accepted while it is the chosen one."""

    def choose(self, scores: torch.Tensor, drafted: Sequence[int]) -> int:
        """Return the token to commit.

        Args:
            scores: processed scores float32 `(1, vocabulary)`.
            drafted: the draft tokens at this position. A lossless rule does not look at them.
        """
        ...

    def choose_all(self, scores: torch.Tensor) -> list[int] | None:
        """The choices at all positions of `(positions, vocabulary)` at once, where they depend on nothing else."""
        ...


class Greedy:
    """The likeliest token: exact match, the output is that of plain greedy decoding."""

    def choose(self, scores: torch.Tensor, drafted: Sequence[int]) -> int:
        """See `AcceptanceRule`."""
        return int(scores.argmax(dim=-1))

    def choose_all(self, scores: torch.Tensor) -> list[int]:
        """See `AcceptanceRule`."""
        choices: list[int] = scores.argmax(dim=-1).tolist()
        return choices


class Sampling:
    """A sample from the target's distribution.

    For a draft that is certain of its tokens, accepting a token with the probability that the target gives it, and
    otherwise sampling from the rest, is the rejection sampling of speculative decoding (Leviathan et al. 2023,
    section 2.3). Sampling first and accepting while the sample equals the draft has the same outcome. It also makes
    one draw a committed token, so that the random numbers are those of plain sampling.
    """

    def choose(self, scores: torch.Tensor, drafted: Sequence[int]) -> int:
        """See `AcceptanceRule`."""
        return int(torch.multinomial(scores.softmax(dim=-1), num_samples=1))

    def choose_all(self, scores: torch.Tensor) -> None:
        """None: every draw waits for the one before."""
        return

"""Acceptance rules by name: which token the target commits at a position, given what was drafted there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch

from freedraft.integrations.hf.settings import GenerateSettings


class AcceptanceRule(Protocol):
    """Chooses the token at a position; a draft token is accepted while it is the chosen one.

    Attributes:
        lossy: whether the output may be another than without a draft.
    """

    lossy: ClassVar[bool]

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

    lossy: ClassVar[bool] = False

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

    lossy: ClassVar[bool] = False

    def choose(self, scores: torch.Tensor, drafted: Sequence[int]) -> int:
        """See `AcceptanceRule`."""
        return int(torch.multinomial(scores.softmax(dim=-1), num_samples=1))

    def choose_all(self, scores: torch.Tensor) -> None:
        """None: every draw waits for the one before."""
        return


class Typical:
    """Typical acceptance, lossy: a draft token that the target finds plausible enough, else a sample.

    A token x is accepted while p(x) > min(epsilon, delta * exp(-H(p))), H being the entropy of the target's
    distribution p in nats (Medusa; Cai et al. 2024, section 3.3.1). Of several such tokens of a tree the likeliest is
    taken. The output leans towards what is drafted: its distribution is not the target's.
    """

    lossy: ClassVar[bool] = True

    def __init__(self, epsilon: float, delta: float) -> None:
        self._epsilon = epsilon
        self._delta = delta
        self._otherwise = Sampling()

    def choose(self, scores: torch.Tensor, drafted: Sequence[int]) -> int:
        """See `AcceptanceRule`."""
        if drafted:
            probability = scores[0].softmax(dim=-1)
            # entr(p) is -p log p, and 0 where p is.
            entropy = float(torch.special.entr(probability).sum())
            threshold = min(self._epsilon, self._delta * math.exp(-entropy))
            chances = probability[torch.tensor(drafted, device=probability.device)]
            likeliest = int(chances.argmax())
            if float(chances[likeliest]) > threshold:
                return drafted[likeliest]
        return self._otherwise.choose(scores, drafted)

    def choose_all(self, scores: torch.Tensor) -> None:
        """None: every choice depends on what was drafted, and draws wait for the one before."""
        return


def make_rule(settings: GenerateSettings, sampled: bool) -> AcceptanceRule:
    """The rule that `settings` names.

    Args:
        settings: the section `generate`.
        sampled: whether `generate` samples. Where it does not, all rules are exact match: as temperature goes to 0,
            only the likeliest token stays plausible.
    """
    if not sampled:
        return Greedy()
    if settings.acceptance == "typical":
        return Typical(settings.epsilon, settings.delta)
    return Sampling()

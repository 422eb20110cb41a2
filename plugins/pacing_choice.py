"""What of a batch of drafts could be verified, and what each choice brings: trees, or the likeliest chains in them.

A sequence that is alone needs a mask for a tree and none for a chain, and of a tree the accepted path has to be
gathered in the cache. So where the tokens that the rule takes are a tree, the rule is tried on the likeliest chains as
well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from freedraft.plugins.base import Drafts
from freedraft.plugins.branches import likeliest_chains
from freedraft.plugins.pacing_rule import (
    best_prefix,
    best_ratio,
    best_width,
    is_tree,
    keep_marked,
    likeliest,
    likeliest_of_each,
    never_rising,
)
from freedraft.plugins.step_time import StepTime
from freedraft.retrieval.ragged import Bool


@dataclass(slots=True, eq=False)
class Part:
    """A part of what was drafted that could be verified.

    Attributes:
        drafts: what it is a part of.
        kept: bool `(t,)`, what is in it.
        surplus: tokens that it brings beyond those that its time is worth.
        cost: time of the step that verifies it, as a multiple of a plain step's.
        tree: it is more than a chain in some row.
    """

    drafts: Drafts
    kept: Bool
    surplus: float
    cost: float
    tree: bool

    @property
    def expected(self) -> float:
        """Tokens of it that are expected to be accepted."""
        return float(self.drafts.probability[self.kept].sum())

    def cut(self) -> Drafts:
        """It alone."""
        whole = self.drafts
        if self.kept.all():
            return whole
        return Drafts(
            *keep_marked(whole.tokens, whole.parents, whole.probability, whole.source, whole.offsets, self.kept)
        )


def choices(
    drafts: Drafts, sequences: int, step_time: StepTime, gain: float, padded: bool, filled: int | None = None
) -> list[Part]:
    """What of `drafts`, which are not empty, could be verified, the best first: a tree and chains, or chains alone.

    Args:
        drafts: what was drafted.
        sequences: S.
        step_time: T.
        gain: tokens a second as a multiple of plain decoding's, in the long run.
        padded: the pass takes as many tokens for every sequence as for the one with the longest draft.
        filled: if given, everything is verified, and so many tokens at least.
    """
    sound = replace(drafts, probability=never_rising(drafts.probability, drafts.parents, drafts.offsets))
    if filled is None:
        here = best_ratio(sound.probability, sound.offsets, padded, sequences, *step_time.knots(sequences))
        gain = math.sqrt(gain * here)
    part = _best_of(sound, sequences, step_time, gain, padded, filled)
    if not part.tree or filled is not None:
        return [part]
    chains = _best_of(likeliest_chains(sound)[0], sequences, step_time, gain, padded, filled)
    return [part, chains] if part.surplus > chains.surplus else [chains, part]


def _best_of(
    drafts: Drafts, sequences: int, step_time: StepTime, gain: float, padded: bool, filled: int | None
) -> Part:
    """The part of drafts with sound probabilities that brings most by the rule; `gain` is its g, others as above."""
    probability = drafts.probability
    if filled is not None:
        kept = np.ones(len(probability), np.bool_)
        widest = sequences * int(np.diff(drafts.offsets).max()) if padded else len(probability)
        verified = max(widest, filled)
        surplus = float(probability.sum()) - gain * sequences * (step_time.cost(sequences, verified) - 1.0)
    elif padded:
        width, surplus = best_width(probability, drafts.offsets, sequences, *step_time.knots(sequences), gain)
        verified = sequences * width
        kept = likeliest_of_each(probability, drafts.offsets, width)
    else:
        verified, surplus = best_prefix(probability, sequences, *step_time.knots(sequences), gain)
        kept = likeliest(probability, verified)
    cost = step_time.cost(sequences, verified)
    tree = bool(is_tree(drafts.parents, drafts.offsets, kept))
    if tree:
        price = step_time.tree_price(sequences)
        surplus, cost = surplus - gain * sequences * price, cost + price
    return Part(drafts, kept, surplus, cost, tree)

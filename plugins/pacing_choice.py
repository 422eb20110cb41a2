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
    best_number,
    best_ratio,
    expected_by_number,
    expected_by_width,
    is_tree,
    keep_marked,
    likeliest,
    likeliest_of_each,
    never_rising,
)
from freedraft.plugins.step_time import StepTime
from freedraft.retrieval.ragged import Bool, Float64


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
        gain: tokens a second as a multiple of plain decoding's, in the long run; with `filled` it is g itself.
        padded: the pass takes as many tokens for every sequence as for the one with the longest draft.
        filled: if given, everything is verified, and so many tokens at least.
    """
    sound = replace(drafts, probability=never_rising(drafts.probability, drafts.parents, drafts.offsets))
    if filled is not None:
        return [_all_of(sound, sequences, step_time, gain, padded, filled)]
    knots = step_time.knots(sequences)
    expected = expected_of(sound, padded)
    more = sequences if padded else 1
    gain = math.sqrt(gain * best_ratio(expected, more, sequences, *knots))
    number, surplus = best_number(expected, more, sequences, *knots, gain)
    part = _first_of(sound, number, surplus, sequences, step_time, gain, padded)
    if not part.tree:
        return [part]
    chains, _ = likeliest_chains(sound)
    number, surplus = best_number(expected_of(chains, padded), more, sequences, *knots, gain)
    straight = _first_of(chains, number, surplus, sequences, step_time, gain, padded)
    return [part, straight] if part.surplus > straight.surplus else [straight, part]


def expected_of(drafts: Drafts, padded: bool) -> Float64:
    """The tokens that 1, 2, ... are expected to commit, of all or of each row; float64."""
    if padded:
        return expected_by_width(drafts.probability, drafts.offsets)
    return expected_by_number(drafts.probability)


def _first_of(
    drafts: Drafts, number: int, surplus: float, sequences: int, step_time: StepTime, gain: float, padded: bool
) -> Part:
    """The `number` likeliest, of all or of each row, which bring `surplus` where they are no tree."""
    if padded:
        kept = likeliest_of_each(drafts.probability, drafts.offsets, number)
        return _part(drafts, kept, surplus, sequences * number, sequences, step_time, gain)
    return _part(drafts, likeliest(drafts.probability, number), surplus, number, sequences, step_time, gain)


def _all_of(drafts: Drafts, sequences: int, step_time: StepTime, gain: float, padded: bool, filled: int) -> Part:
    """All of the drafts, in a pass that takes `filled` draft tokens at least."""
    widest = sequences * int(np.diff(drafts.offsets).max()) if padded else len(drafts.tokens)
    verified = max(widest, filled)
    price = gain * sequences * (step_time.cost(sequences, verified) - 1.0)
    kept = np.ones(len(drafts.tokens), np.bool_)
    return _part(drafts, kept, float(drafts.probability.sum()) - price, verified, sequences, step_time, gain)


def _part(
    drafts: Drafts, kept: Bool, surplus: float, verified: int, sequences: int, step_time: StepTime, gain: float
) -> Part:
    """A part that brings `surplus` where it is no tree, in a pass with `verified` draft tokens."""
    cost = step_time.cost(sequences, verified)
    tree = bool(is_tree(drafts.parents, drafts.offsets, kept))
    if tree:
        price = step_time.tree_price(sequences)
        surplus, cost = surplus - gain * sequences * price, cost + price
    return Part(drafts, kept, surplus, cost, tree)

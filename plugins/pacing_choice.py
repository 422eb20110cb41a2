"""What of a batch of drafts could be verified, and what each choice brings: trees, or the likeliest chains in them.

A sequence that is alone needs a mask for a tree and none for a chain, and of a tree the accepted path has to be
gathered in the cache. So where the tokens that the rule takes are a tree, the rule is tried on the likeliest chains as
well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from freedraft.plugins.base import Drafts
from freedraft.plugins.branches import likeliest_chains
from freedraft.plugins.pacing_rule import best_part, is_tree, keep_marked, never_rising
from freedraft.plugins.step_time import StepTime
from freedraft.retrieval.ragged import Bool, Float64, Int64


@dataclass(slots=True, eq=False)
class Part:
    """A part of what was drafted that could be verified.

    Attributes:
        drafts: what it is a part of.
        kept: bool `(t,)`, what is in it.
        expected: tokens of it that are expected to be accepted.
        left_out: the highest probability, as it was told, of what is not in it; 0 where all is.
        surplus: tokens that it brings beyond those that its time is worth.
        cost: time of the step that verifies it, as a multiple of a plain step's.
        tree: it is more than a chain in some row.
    """

    drafts: Drafts
    kept: Bool
    expected: float
    left_out: float
    surplus: float
    cost: float
    tree: bool

    def cut(self) -> Drafts:
        """It alone."""
        whole = self.drafts
        if self.kept.all():
            return whole
        return Drafts(
            *keep_marked(whole.tokens, whole.parents, whole.probability, whole.source, whole.offsets, self.kept)
        )


def choices(
    drafts: Drafts,
    trust: float,
    sequences: int,
    step_time: StepTime,
    gain: float,
    padded: bool,
    filled: int | None = None,
) -> list[Part]:
    """What of `drafts`, which are not empty, could be verified, the best first: a tree and chains, or chains alone.

    Args:
        drafts: what was drafted.
        trust: what its probabilities are worth, as a share of what they say.
        sequences: S.
        step_time: T.
        gain: tokens a second as a multiple of plain decoding's, in the long run; with `filled` it is g itself.
        padded: the pass takes as many tokens for every sequence as for the one with the longest draft.
        filled: if given, everything is verified, and so many tokens at least.
    """
    probability = never_rising(drafts.probability, drafts.parents, drafts.offsets)
    sound = Drafts(drafts.tokens, drafts.parents, probability, drafts.source, drafts.offsets)
    if filled is not None:
        return [_all_of(sound, trust, sequences, step_time, gain, padded, filled)]
    knots = step_time.knots(sequences)
    part, gain = _best_of(sound, trust, sequences, knots, gain, padded, False)
    if not part.tree:
        return [part]
    _charge(part, sequences, step_time, gain)
    chains, _ = likeliest_chains(sound)
    straight, _ = _best_of(chains, trust, sequences, knots, gain, padded, True)
    return [part, straight] if part.surplus > straight.surplus else [straight, part]


def _best_of(
    drafts: Drafts,
    trust: float,
    sequences: int,
    knots: tuple[float, Int64, Float64],
    gain: float,
    padded: bool,
    final: bool,
) -> tuple[Part, float]:
    """The part that the rule takes, not charged for being a tree, and g."""
    kept, expected, left_out, surplus, cost, tree, gain = best_part(
        drafts.probability, drafts.parents, drafts.offsets, trust, padded, sequences, *knots, gain, final
    )
    return Part(drafts, kept, expected, left_out, surplus, cost, tree), gain


def _all_of(
    drafts: Drafts, trust: float, sequences: int, step_time: StepTime, gain: float, padded: bool, filled: int
) -> Part:
    """All of the drafts, in a pass that takes `filled` draft tokens at least."""
    widest = sequences * int(np.diff(drafts.offsets).max()) if padded else len(drafts.tokens)
    cost = step_time.cost(sequences, max(widest, filled))
    kept = np.ones(len(drafts.tokens), np.bool_)
    expected = trust * float(drafts.probability.sum())
    surplus = expected - gain * sequences * (cost - 1.0)
    part = Part(drafts, kept, expected, 0.0, surplus, cost, bool(is_tree(drafts.parents, drafts.offsets, kept)))
    if part.tree:
        _charge(part, sequences, step_time, gain)
    return part


def _charge(part: Part, sequences: int, step_time: StepTime, gain: float) -> None:
    """Put what a tree costs more to a part that is one."""
    price = step_time.tree_price(sequences)
    part.surplus -= gain * sequences * price
    part.cost += price

"""Drafters whose drafts are evidence for another one: they are told what it was, and how it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from freedraft.plugins.base import Drafter, Drafts, Feedback, FeedbackKind, FollowsDrafts, KeepsReplies, TakesReference
from freedraft.plugins.checks import checked_drafts
from freedraft.plugins.proposals import MOST_DRAFTERS, keep_proposals, no_proposals
from freedraft.plugins.registry import drafter_class, make_drafter
from freedraft.plugins.slots import grown
from freedraft.plugins.verified import FOLLOWED
from freedraft.retrieval.errors import ConfigError
from freedraft.retrieval.ragged import Int32, Int64


class OtherDrafters:
    """Several drafters that follow the same sequences, under the slots of the one that they serve.

    Args:
        drafters: their settings by name.
        scope: whose texts they share, for those that have this setting and were not given it.

    Attributes:
        proposals: their newest drafts.
        feedback: what at least one of them has to be told.
        feedback_top_k: the most tokens of `Feedback.top_k` that one wants.

    Raises:
        ConfigError: an unknown name or setting, too many, or a drafter that learns from its own drafts alone.
    """

    def __init__(self, drafters: Mapping[str, Mapping[str, Any]], scope: str) -> None:
        if len(drafters) > MOST_DRAFTERS:
            raise ConfigError(f"drafters: at most {MOST_DRAFTERS}, got {len(drafters)}")
        self._drafters = [_made(name, settings, scope) for name, settings in drafters.items()]
        self._slots: list[Int64] = [np.zeros(0, np.int64) for _ in self._drafters]
        self.proposals = no_proposals(len(self._drafters), FOLLOWED)
        self.feedback: frozenset[FeedbackKind] = frozenset().union(*(drafter.feedback for drafter in self._drafters))
        self.feedback_top_k = max((getattr(drafter, "feedback_top_k", 1) for drafter in self._drafters), default=1)

    def open(self, slots: Int64) -> None:
        """Start sequences without a token yet in these slots of the drafter that is served."""
        if not self._drafters:
            return
        capacity = int(slots.max(initial=-1)) + 1
        if capacity > len(self.proposals.nodes):
            capacity = max(capacity, 2 * len(self.proposals.nodes))
            self.proposals = type(self.proposals)(*(grown(array, capacity) for array in self.proposals))
        self.proposals.nodes[slots] = 0
        nothing = np.empty(0, np.int32), np.zeros(len(slots) + 1, np.int64)
        for i, drafter in enumerate(self._drafters):
            self._slots[i] = grown(self._slots[i], len(self.proposals.nodes))
            try:
                self._slots[i][slots] = drafter.open(*nothing)
            except Exception:
                for before in range(i):
                    self._drafters[before].close(self._slots[before][slots])
                raise

    def refer(self, slots: Int64, texts: Int32, offsets: Int64) -> None:
        """As `TakesReference.refer`."""
        for i, drafter in enumerate(self._drafters):
            if isinstance(drafter, TakesReference):
                drafter.refer(self._slots[i][slots], texts, offsets)

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`; the proposals are used up."""
        for i, drafter in enumerate(self._drafters):
            drafter.extend(self._slots[i][slots], tokens, offsets)
            self.proposals.nodes[slots] = 0

    def propose(self, slots: Int64, budget: Int32) -> None:
        """Draft anew; of a draft, the first `FOLLOWED` nodes are looked at.

        Raises:
            InputError: drafts that are malformed.
        """
        for i, drafter in enumerate(self._drafters):
            drafts = checked_drafts(drafter.draft(self._slots[i][slots], budget), budget)
            keep_proposals(self.proposals, i, slots, drafts.tokens, drafts.parents, drafts.probability, drafts.offsets)

    def adopt(self, slots: Int64, drafts: Drafts) -> None:
        """As `FollowsDrafts.adopt`."""
        for i, drafter in enumerate(self._drafters):
            if drafter.feedback and isinstance(drafter, FollowsDrafts):
                drafter.adopt(self._slots[i][slots], drafts)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """As `Drafter.observe`."""
        for i, drafter in enumerate(self._drafters):
            if drafter.feedback:
                drafter.observe(self._slots[i][slots], feedback)

    def end_reply(self, slots: Int64) -> None:
        """As `KeepsReplies.end_reply`."""
        for i, drafter in enumerate(self._drafters):
            if isinstance(drafter, KeepsReplies):
                drafter.end_reply(self._slots[i][slots])

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`."""
        for i, drafter in enumerate(self._drafters):
            drafter.close(self._slots[i][slots])


def _made(name: str, settings: Mapping[str, Any], scope: str) -> Drafter:
    if "scope" in drafter_class(name).Settings.model_fields:
        settings = {"scope": scope, **settings}
    drafter = make_drafter(name, settings)
    if drafter.feedback and not isinstance(drafter, FollowsDrafts):
        hint = "; use `recycling: true`" if name == "token_recycling" else ""
        raise ConfigError(f"drafters: {name} learns from its own drafts alone{hint}")
    return drafter

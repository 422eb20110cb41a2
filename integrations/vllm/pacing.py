"""Pacing in vLLM: the time between two calls is a step's, unless something else was in it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np

from freedraft.integrations.vllm.last_drafts import Verified
from freedraft.plugins.base import Drafter, Drafts
from freedraft.plugins.pacing import Pacer, compile_kernels


class StepPacing:
    """Feeds a pacer from the calls of a proposer, and lets it cut the drafts.

    A call comes right after a forward pass, so from one call to the next is a whole step: drafting, scheduling, the
    pass, sampling. Steps with a prompt in them, or after which the engine had nothing to do, take longer for other
    reasons: a row that got no token at one of the two calls, or that grew by other than the step's tokens, tells them.

    Attributes:
        pacer: decides.
        uniform: all rows get drafts of one length or none does.
        filled: the drafts of this step are to be filled up to that length.
    """

    def __init__(self, pacer: Pacer, longest: int, clock: Callable[[], float] = perf_counter) -> None:
        """Compiles the pacer's kernels; `longest` is the length of uniform drafts."""
        self.pacer = pacer
        self.uniform = pacer.settings.uniform
        self.filled = False
        self._longest = longest
        self._clock = clock
        self._called: float | None = None
        compile_kernels()

    def stepped(self, decoding: int, steady: bool, verified: Verified, most: int | None = None) -> None:
        """Take in the step that ended just now.

        Args:
            decoding: rows that got tokens.
            steady: all rows did, and in the last step too.
            verified: the drafts that the step verified.
            most: no more tokens than this were in its forward pass; None where that is not known.
        """
        before, self._called = self._called, self._clock()
        if before is not None and steady and decoding:
            drafted = decoding * self._longest if self.filled else len(verified.probability)
            drafted = drafted if most is None else min(drafted, max(most - decoding, 0))
            self.pacer.record(decoding, drafted, self._called - before)
        if len(verified.sequences):
            self.pacer.judge(verified.probability, verified.offsets, verified.accepted.astype(np.int64) - 1)

    def floor(self, drafter: Drafter, decoding: int, most: int) -> None:
        """Tell a drafter that wants to know below which probability a token is not worth drafting."""
        if hasattr(drafter, "floor"):
            drafter.floor = self.pacer.floor(decoding, most)

    def cut(self, drafts: Drafts, decoding: int) -> Drafts:
        """What pays of the drafts, in a batch of `decoding` rows; to be called in each step."""
        if decoding:
            drafts = self.pacer.cut(drafts, decoding, decoding * self._longest if self.uniform else 0)
        self.filled = self.uniform and len(drafts.tokens) > 0
        return drafts

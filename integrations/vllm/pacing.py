"""Pacing in vLLM: the time between two calls is a step's, unless a prompt was in it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np

from freedraft.integrations.vllm.ledger import Verified
from freedraft.plugins.base import Drafter, Drafts
from freedraft.plugins.pacing import Pacer, compile_kernels
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int64


class StepPacing:
    """Feeds a pacer from the calls of a proposer, and lets it cut the drafts.

    A call comes right after a forward pass, so from one call to the next is a whole step: drafting, scheduling, the
    pass, sampling. Steps with a prompt in them, or after which the engine had nothing to do, take longer for other
    reasons: a new sequence tells them, or a row without a new token.
    """

    def __init__(self, pacer: Pacer, sequences: int, longest: int, clock: Callable[[], float] = perf_counter) -> None:
        """Prepare for `sequences` sequences with drafts of up to `longest` tokens; compiles the pacer's kernels."""
        self.pacer = pacer
        self._clock = clock
        self._called: float | None = None
        self._probability: Float32 = np.zeros((sequences, longest), np.float32)
        compile_kernels()

    def stepped(self, decoding: int, steady: bool, verified: Verified) -> None:
        """Take in the step that ended just now.

        Args:
            decoding: rows that got tokens.
            steady: all rows did, and none is new.
            verified: the drafts that the step verified.
        """
        before, self._called = self._called, self._clock()
        if before is not None and steady and decoding:
            self.pacer.record(decoding + int(verified.drafted.sum()), self._called - before)
        if len(verified.sequences):
            probability, offsets = _noted(self._probability, verified.sequences, verified.drafted)
            self.pacer.judge(probability, offsets, verified.accepted.astype(np.int64))

    def floor(self, drafter: Drafter, decoding: int, most: int) -> None:
        """Tell a drafter that wants to know below which probability a token is not worth drafting."""
        if hasattr(drafter, "floor"):
            drafter.floor = self.pacer.floor(decoding, most)

    def cut(self, drafts: Drafts, sequences: Int64, decoding: int) -> Drafts:
        """What pays of the drafts, one chain for each of `sequences`, in a batch of `decoding` rows."""
        drafts = self.pacer.cut(drafts, decoding)
        _note(self._probability, sequences, drafts.probability, drafts.offsets)
        return drafts


@kernel
def _note(table: Float32, sequences: Int64, probability: Float32, offsets: Int64) -> None:
    for i in range(len(sequences)):
        for j in range(offsets[i + 1] - offsets[i]):
            table[sequences[i], j] = probability[offsets[i] + j]


@kernel
def _noted(table: Float32, sequences: Int64, lengths: Int64) -> tuple[Float32, Int64]:
    offsets = np.zeros(len(sequences) + 1, np.int64)
    for i in range(len(sequences)):
        offsets[i + 1] = offsets[i] + lengths[i]
    probability = np.empty(offsets[-1], np.float32)
    for i in range(len(sequences)):
        for j in range(lengths[i]):
            probability[offsets[i] + j] = table[sequences[i], j]
    return probability, offsets

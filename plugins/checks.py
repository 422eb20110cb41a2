"""Whether drafts are what `Drafts` promises: kernels that read them do not look."""

from __future__ import annotations

import numpy as np

from freedraft.plugins.base import Drafts
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import MAX_TOKEN, Float32, Int32, Int64

# What can be wrong with a draft; of several, the one named first here is told.
SOUND, BAD_ROWS, BAD_PROBABILITY, BAD_TOKENS, BAD_PARENTS = range(5)


def checked_drafts(drafts: Drafts, budget: Int32) -> Drafts:
    """Return `drafts`, their arrays fit for kernels, if they are well formed and within the budget, int32 `(n,)`.

    Raises:
        InputError: what is wrong.
    """
    tokens, offsets = drafts.tokens, drafts.offsets
    if offsets.shape != (len(budget) + 1,) or offsets[0] != 0 or offsets[-1] != len(tokens):
        raise InputError(
            f"the drafter's draft: offsets {offsets} do not fit {len(budget)} rows and {len(tokens)} tokens in all"
        )
    if offsets.dtype != np.int64:
        raise InputError(f"the drafter's draft: expected int64 offsets, got {offsets.dtype}")
    if not len(tokens) and not offsets.any():
        # Of whatever type they are.
        drafts = Drafts.empty(len(budget))
    tokens, parents, probability, source = drafts.tokens, drafts.parents, drafts.probability, drafts.source
    if not (len(tokens),) == tokens.shape == parents.shape == probability.shape == source.shape:
        raise InputError(
            "the drafter's draft: expected tokens, parents, probability and source of one shape (t,), got "
            f"{tokens.shape}, {parents.shape}, {probability.shape} and {source.shape}"
        )
    if tokens.dtype != np.int32 or parents.dtype != np.int32:
        raise InputError(f"the drafter's draft: expected int32, got tokens {tokens.dtype}, parents {parents.dtype}")
    if probability.dtype != np.float32 or source.dtype != np.uint8:
        raise InputError(
            f"the drafter's draft: expected float32 probability and uint8 source, got "
            f"{probability.dtype} and {source.dtype}"
        )
    if not all(array.flags.carray for array in (tokens, parents, probability, source, offsets)):
        # Kernels would be compiled anew for views with gaps, and for arrays that can't be written to.
        drafts = Drafts(tokens.copy(), parents.copy(), probability.copy(), source.copy(), offsets.copy())
    fault = _fault(drafts.tokens, drafts.parents, drafts.probability, drafts.offsets, budget)
    if fault == BAD_ROWS:
        raise InputError(f"the drafter's draft: rows of {np.diff(offsets)} tokens with a budget of {budget}")
    if fault == BAD_PROBABILITY:
        raise InputError("the drafter's draft: a probability is not a number")
    if fault == BAD_TOKENS:
        raise InputError(f"the drafter's draft: token ids {tokens.min()} to {tokens.max()} outside 0..{MAX_TOKEN - 1}")
    if fault == BAD_PARENTS:
        raise InputError(f"the drafter's draft: parents {parents} must be -1 or an earlier node of the row")
    return drafts


@kernel
def _fault(tokens: Int32, parents: Int32, probability: Float32, offsets: Int64, budget: Int32) -> int:
    """What is wrong with drafts whose shapes and types fit, or `SOUND`."""
    for row in range(len(budget)):
        if not 0 <= offsets[row + 1] - offsets[row] <= budget[row]:
            return BAD_ROWS
    fault = SOUND
    for row in range(len(budget)):
        for i in range(offsets[row], offsets[row + 1]):
            if not np.isfinite(probability[i]):
                return BAD_PROBABILITY
            if not 0 <= tokens[i] < MAX_TOKEN:
                fault = BAD_TOKENS
            elif fault == SOUND and not -1 <= parents[i] < i - offsets[row]:
                fault = BAD_PARENTS
    return fault


def within_vocabulary(drafts: Drafts, vocabulary: int) -> Drafts:
    """`drafts` without the rows in which a token id is `vocabulary` or higher: a prompt's text may have such ids."""
    if not len(drafts.tokens) or drafts.tokens.max() < vocabulary:
        return drafts
    beyond = np.concatenate([[0], np.cumsum(drafts.tokens >= vocabulary)])
    lengths = np.diff(drafts.offsets)
    kept = np.diff(beyond[drafts.offsets]) == 0
    nodes = np.repeat(kept, lengths)
    offsets = np.concatenate([[0], np.cumsum(np.where(kept, lengths, 0))]).astype(np.int64)
    parts = (drafts.tokens[nodes], drafts.parents[nodes], drafts.probability[nodes], drafts.source[nodes])
    return Drafts(*parts, offsets)

"""Whether drafts are what `Drafts` promises: kernels that read them do not look."""

from __future__ import annotations

import numpy as np

from freedraft.plugins.base import Drafts
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import MAX_TOKEN, Float32, Int32, Int64

NONE, ROWS, PROBABILITY, TOKEN, PARENT = range(5)


def checked_drafts(drafts: Drafts, budget: Int32) -> Drafts:
    """Return `drafts` if they are well formed and within the budget, int32 `(n,)`.

    Raises:
        InputError: what is wrong.
    """
    tokens, parents, offsets = drafts.tokens, drafts.parents, drafts.offsets
    if offsets.shape != (len(budget) + 1,) or offsets[0] != 0 or offsets[-1] != len(tokens):
        raise InputError(
            f"the drafter's draft: offsets {offsets} do not fit {len(budget)} rows and {len(tokens)} tokens in all"
        )
    if offsets.dtype != np.int64:
        raise InputError(f"the drafter's draft: expected int64 offsets, got {offsets.dtype}")
    if not len(tokens):
        return drafts
    if not (len(tokens),) == tokens.shape == parents.shape == drafts.probability.shape == drafts.source.shape:
        raise InputError(
            "the drafter's draft: expected tokens, parents, probability and source of one shape (t,), got "
            f"{tokens.shape}, {parents.shape}, {drafts.probability.shape} and {drafts.source.shape}"
        )
    if tokens.dtype != np.int32 or parents.dtype != np.int32:
        raise InputError(f"the drafter's draft: expected int32, got tokens {tokens.dtype}, parents {parents.dtype}")
    if drafts.probability.dtype != np.float32 or drafts.source.dtype != np.uint8:
        raise InputError(
            f"the drafter's draft: expected float32 probability and uint8 source, got "
            f"{drafts.probability.dtype} and {drafts.source.dtype}"
        )
    fault = _fault(tokens, parents, drafts.probability, offsets, budget)
    if fault == ROWS:
        raise InputError(f"the drafter's draft: rows of {np.diff(offsets)} tokens with a budget of {budget}")
    if fault == PROBABILITY:
        raise InputError("the drafter's draft: a probability is not a number")
    if fault == TOKEN:
        raise InputError(f"the drafter's draft: token ids {tokens.min()} to {tokens.max()} outside 0..{MAX_TOKEN - 1}")
    if fault == PARENT:
        raise InputError(f"the drafter's draft: parents {parents} must be -1 or an earlier node of the row")
    return drafts


@kernel
def _fault(tokens: Int32, parents: Int32, probability: Float32, offsets: Int64, budget: Int32) -> int:
    """The first thing that is wrong with drafts whose shapes fit; `NONE` if nothing is."""
    for row in range(len(budget)):
        if not 0 <= offsets[row + 1] - offsets[row] <= budget[row]:
            return ROWS
    fault = NONE
    for row in range(len(budget)):
        for i in range(offsets[row], offsets[row + 1]):
            if not np.isfinite(probability[i]):
                return PROBABILITY
            if not 0 <= tokens[i] < MAX_TOKEN:
                fault = TOKEN
            elif fault == NONE and not -1 <= parents[i] < i - offsets[row]:
                fault = PARENT
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

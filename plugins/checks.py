"""Whether drafts are what `Drafts` promises: kernels that read them do not look."""

from __future__ import annotations

import numpy as np

from freedraft.plugins.base import Drafts
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import MAX_TOKEN, Int32


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
    lengths = offsets[1:] - offsets[:-1]
    if lengths.min() < 0 or (lengths > budget).any():
        raise InputError(f"the drafter's draft: rows of {lengths} tokens with a budget of {budget}")
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
    if not np.isfinite(drafts.probability).all():
        raise InputError("the drafter's draft: a probability is not a number")
    # Seen as unsigned, a negative id is a huge one, and the parent -1 wraps round to 0 when 1 is added.
    if tokens.view(np.uint32).max() >= MAX_TOKEN:
        raise InputError(f"the drafter's draft: token ids {tokens.min()} to {tokens.max()} outside 0..{MAX_TOKEN - 1}")
    index = np.arange(len(tokens)) if len(budget) == 1 else np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    if (parents.view(np.uint32) + np.uint32(1) > index).any():
        raise InputError(f"the drafter's draft: parents {parents} must be -1 or an earlier node of the row")
    return drafts


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

"""What a place is, and what places vote for: the steps that the CPU's and the GPU's kernels share.

A place is an earlier position in a sequence whose preceding tokens equal the sequence's last ones. It is one int64,
its key: the match's length in the upper half, the position in the lower. So the larger of two keys is the better
place: the longer match, or the more recent of equally long ones. Key 0 stands for no place.

These are plain functions, which call no other, so that each target's compiler takes them as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from freedraft.retrieval.ragged import Float32, Int32, Int64

PLACES = 4
"""How many places of a sequence vote."""

PRIOR = 4
"""The weight of the continuation that no place has seen."""

WEIGHTY = 32
"""A match longer than this has no more weight than one of this length."""

LOW_HALF = 0xFFFFFFFF


def sequence_length(tokens: Int32, lengths: Int32, slot: int) -> Any:
    """How many tokens a slot has; 0 if there is no such slot."""
    if slot < 0 or slot >= tokens.shape[0]:
        return np.int64(0)
    return min(max(np.int64(lengths[slot]), np.int64(0)), np.int64(tokens.shape[1]))


def match_length(tokens: Int32, slot: int, length: int, position: int, longest: int) -> int:
    """How many tokens before `position` equal the last of the sequence, `longest` at most."""
    most = min(position, longest)
    matched = 0
    while matched < most and tokens[slot, position - 1 - matched] == tokens[slot, length - 1 - matched]:
        matched += 1
    return matched


def keep_place(keys: Int64, key: Any) -> None:
    """Put a key into the descending list `keys` `(PLACES,)`; the smallest falls out.

    Every index is a constant once the loop is unrolled, so a GPU thread keeps its list in registers.
    """
    for i in range(PLACES):
        if key > keys[i]:
            smaller = keys[i]
            keys[i] = key
            key = smaller


def vote(
    text: Int32,
    length: int,
    keys: Int64,
    following: Int64,
    budget: int,
    least: float,
    drafts: Int64,
    probability: Float32,
) -> int:
    """Draft what the places vote for, and fill the rest of the row.

    For each next token, the places that have agreed with the draft so far vote for their own next one, each with the
    square of its match's length as weight. The heaviest token is drafted (of equally heavy ones, the better place's),
    with the probability weight / (weight of all + PRIOR), times its predecessors'. A place that reaches the end of
    the sequence goes on with the draft itself: periodic text is continued for as long as asked.

    Args:
        text: int32 `(width,)`, the sequence and what lies behind it.
        length: tokens of the sequence.
        keys: int64 `(PLACES,)`, descending.
        following: int64 `(PLACES,)`, room for each place's next token.
        budget: tokens to draft, at most; no more than fit in `width` either.
        least: a draft ends before the token whose probability is below this.
        drafts: int64 `(k,)`, written in full: after the draft, the sequence's last token, or 0 if it is empty.
        probability: float32 `(k,)`, written in full: after the draft, 0.

    Returns:
        How many tokens are drafted.
    """
    alive = 0
    for i in range(PLACES):
        if keys[i] > 0:
            alive |= 1 << i
    room = min(min(budget, drafts.shape[0]), text.shape[0] - length)
    path = np.float32(1.0)
    count = 0
    while count < room and alive != 0:
        # All are read before any is compared, so that a GPU thread waits for memory once.
        for i in range(PLACES):
            if (alive >> i) & 1:
                at = (keys[i] & LOW_HALF) + count
                following[i] = np.int64(text[at]) if at < length else drafts[at - length]
        total = 0
        heaviest = 0
        chosen = np.int64(0)
        for i in range(PLACES):
            if (alive >> i) & 1:
                weight = 0
                for j in range(PLACES):
                    if (alive >> j) & 1 and following[j] == following[i]:
                        matched = min(keys[j] >> 32, WEIGHTY)
                        weight += matched * matched
                matched = min(keys[i] >> 32, WEIGHTY)
                total += matched * matched
                if weight > heaviest:
                    heaviest = weight
                    chosen = following[i]
        path = path * (np.float32(heaviest) / np.float32(total + PRIOR))
        if path < least:
            break
        for i in range(PLACES):
            if (alive >> i) & 1 and following[i] != chosen:
                alive &= ~(1 << i)
        drafts[count] = chosen
        probability[count] = path
        count += 1
    filler = np.int64(text[length - 1]) if length > 0 else np.int64(0)
    for i in range(count, drafts.shape[0]):
        drafts[i] = filler
        probability[i] = np.float32(0.0)
    return count

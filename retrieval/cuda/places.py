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
    """Put a key into the descending list `keys` `(PLACES,)`; the smallest falls out."""
    if key <= keys[PLACES - 1]:
        return
    at = PLACES - 1
    while at > 0 and keys[at - 1] < key:
        keys[at] = keys[at - 1]
        at -= 1
    keys[at] = key


def vote(
    tokens: Int32, slot: int, length: int, keys: Int64, budget: int, least: float, drafts: Int64, probability: Float32
) -> int:
    """Draft what the places vote for, and fill the rest of the row.

    For each next token, the places that have agreed with the draft so far vote for their own next one, each with the
    square of its match's length as weight. The heaviest token is drafted (of equally heavy ones, the better place's),
    with the probability weight / (weight of all + PRIOR), times its predecessors'. A place that reaches the end of
    the sequence goes on with the draft itself: periodic text is continued for as long as asked.

    Args:
        tokens: int32 `(slots, width)`.
        slot: the row in `tokens`.
        length: tokens in it.
        keys: int64 `(PLACES,)`, descending.
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
    room = min(min(budget, drafts.shape[0]), tokens.shape[1] - length)
    path = np.float32(1.0)
    count = 0
    while count < room and alive != 0:
        total = 0
        heaviest = 0
        chosen = np.int64(0)
        for i in range(PLACES):
            if (alive >> i) & 1:
                at = (keys[i] & LOW_HALF) + count
                token = np.int64(tokens[slot, at]) if at < length else drafts[at - length]
                weight = 0
                for j in range(PLACES):
                    if (alive >> j) & 1:
                        other = (keys[j] & LOW_HALF) + count
                        if (np.int64(tokens[slot, other]) if other < length else drafts[other - length]) == token:
                            matched = min(keys[j] >> 32, WEIGHTY)
                            weight += matched * matched
                matched = min(keys[i] >> 32, WEIGHTY)
                total += matched * matched
                if weight > heaviest:
                    heaviest = weight
                    chosen = token
        path = path * (np.float32(heaviest) / np.float32(total + PRIOR))
        if path < least:
            break
        for i in range(PLACES):
            if (alive >> i) & 1:
                at = (keys[i] & LOW_HALF) + count
                if (np.int64(tokens[slot, at]) if at < length else drafts[at - length]) != chosen:
                    alive &= ~(1 << i)
        drafts[count] = chosen
        probability[count] = path
        count += 1
    filler = np.int64(tokens[slot, length - 1]) if length > 0 else np.int64(0)
    for i in range(count, drafts.shape[0]):
        drafts[i] = filler
        probability[i] = np.float32(0.0)
    return count

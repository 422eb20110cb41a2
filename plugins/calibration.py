"""Calibration: whether probabilities are what they say, by tenths of the probability.

A token's probability here is the one that it is right if its ancestors are. The account of it is float64
`(BUCKETS, 3)`: tokens judged, of them right, and the sum of their probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Float64, Int32, Int64

BUCKETS = 10
NO_PARENTS: Int32 = np.empty(0, np.int32)
"""In place of the parents of drafts that are all chains."""


def nothing_judged() -> Float64:
    """An account of nothing."""
    return np.zeros((BUCKETS, 3))


def buckets(account: Float64) -> list[dict[str, Any]]:
    """For each bucket that has any: how many `tokens`, and the `predicted` and the `observed` share of right ones."""
    return [
        {"tokens": int(count), "predicted": round(total / count, 4), "observed": round(right / count, 4)}
        for count, right, total in account.tolist()
        if count
    ]


@kernel
def judge_nodes(
    probability: Float32, offsets: Int64, last: Int64, parents: Int32, account: Float64
) -> tuple[float, int]:
    """Take in how drafts did: of each, the tokens whose ancestors were right.

    Args:
        probability: float32 `(t,)`, cumulative along each path, as in `Drafts`.
        offsets: int64 `(n + 1,)`.
        last: int64 `(n,)`, the node of each row that was right last, -1 = none.
        parents: int32 `(t,)`, as in `Drafts`, or `NO_PARENTS`.
        account: is brought up to date.

    Returns:
        How many tokens were expected to be right, and how many were, each with its ancestors.
    """
    expected, accepted = 0.0, 0
    right = np.empty(len(probability), np.bool_)
    for row in range(len(offsets) - 1):
        start = offsets[row]
        count = offsets[row + 1] - start
        right[:count] = False
        node = last[row]
        while 0 <= node < count:
            right[node] = True
            accepted += 1
            node = parents[start + node] if len(parents) else node - 1
        for i in range(count):
            expected += min(probability[start + i], 1.0) if probability[start + i] > 0.0 else 0.0
            parent = parents[start + i] if len(parents) else i - 1
            if parent >= 0 and not right[parent]:
                continue
            above = probability[start + parent] if parent >= 0 else 1.0
            now = probability[start + i]
            # Neither may be a number that is none.
            before = min(above, 1.0) if above > 0.0 else 0.0
            conditional = min(now / max(before, 1e-9), 1.0) if now > 0.0 else 0.0
            at = min(int(conditional * len(account)), len(account) - 1)
            account[at, 0] += 1.0
            account[at, 1] += 1.0 if right[i] else 0.0
            account[at, 2] += conditional
    return expected, accepted

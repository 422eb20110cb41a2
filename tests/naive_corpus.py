"""What a segment of an index drafts, by search in its documents."""

from __future__ import annotations

from collections.abc import Sequence

import naive

from freedraft.retrieval.index.continuation import ESCAPE


def chain(rows: Sequence[Sequence[int]], text: list[int], budget: int) -> tuple[list[int], list[float]]:
    """What one segment of the documents `rows` drafts, by search."""

    def contexts(text):
        """Those of which nothing longer occurs exactly where they do, longest first."""
        lengths = list(range(naive.index_match(rows, text), 0, -1))
        counts = {m: naive.index_count(rows, text[len(text) - m :]) for m in lengths}
        return [m for m in lengths if counts[m] and (m == lengths[0] or counts[m] != counts[m + 1])]

    def likelihood(m, text):
        context = text[len(text) - m :]
        token, times = naive.index_likeliest(rows, context)
        return token, times / (naive.index_count(rows, context) + ESCAPE / m)

    best = max(contexts(text)[:4], key=lambda m: likelihood(m, text)[1], default=0)
    drafted, probabilities, p = [], [], 1.0
    while best and len(drafted) < budget:
        token, chance = likelihood(best, text)
        p *= min(1.0, chance)
        drafted.append(token)
        probabilities.append(p)
        text = text[len(text) - best :] + [token]
        best = naive.index_match(rows, text)
    return drafted, probabilities

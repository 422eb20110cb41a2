"""The exhaustive scan in plain Python, straight from its definition; imports nothing of ours but naive's float32."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from naive import float32


def places(text: Sequence[int], longest: int, shortest: int, most: int) -> list[tuple[int, int]]:
    """(matched, position) of the best earlier positions: longest match first, then most recent."""
    found = []
    for position in range(1, len(text)):
        matched = 0
        while matched < min(position, longest) and text[position - matched - 1] == text[len(text) - matched - 1]:
            matched += 1
        if matched >= shortest:
            found.append((matched, position))
    return sorted(found, reverse=True)[:most]


def draft(
    text: Sequence[int],
    room: int,
    *,
    longest: int,
    shortest: int,
    least: float,
    most: int = 4,
    prior: int = 4,
    weighty: int = 32,
) -> tuple[list[int], list[float]]:
    """At most `room` tokens and the probability of each together with all before it."""
    alive = [(position, min(matched, weighty) ** 2) for matched, position in places(text, longest, shortest, most)]
    drafted: list[int] = []
    probability: list[float] = []
    path = 1.0
    while alive and len(drafted) < room:
        so_far = [*text, *drafted]
        weights: dict[int, int] = defaultdict(int)
        for position, weight in alive:
            weights[so_far[position + len(drafted)]] += weight
        # A dict keeps the order of insertion, which is that of the places; max returns the first of equals.
        token = max(weights, key=lambda t: weights[t])
        path = float32(path * float32(weights[token] / (sum(weights.values()) + prior)))
        if path < float32(least):
            break
        alive = [(position, weight) for position, weight in alive if so_far[position + len(drafted)] == token]
        drafted.append(token)
        probability.append(path)
    return drafted, probability

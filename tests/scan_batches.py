"""Batches for the scan's tests: random, adversarial, and at every edge."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from naive import de_bruijn, fibonacci_word


class Batch(NamedTuple):
    """The inputs of a scan: `tokens (slots, width)`, `lengths (slots,)`, `rows (n,)`, `active (n,)`."""

    tokens: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    active: np.ndarray


STALE = 2**31 - 7


def batch(texts, width, rows=None, active=None):
    """A batch of these texts, one a slot; what lies behind a text is stale and must not be read."""
    tokens = np.full((len(texts), width), STALE, np.int32)
    for slot, text in enumerate(texts):
        tokens[slot, : len(text)] = text[:width]
    lengths = np.array([len(text) for text in texts], np.int32)
    rows = np.arange(len(texts)) if rows is None else np.array(rows)
    active = np.ones(len(rows)) if active is None else np.array(active)
    return Batch(tokens, lengths, rows.astype(np.int64), active.astype(np.int32))


def adversarial():
    """Batches by name: what is long to match, short to hold, or at an edge."""
    width = 96
    return {
        "one token only": batch([[7] * n for n in (1, 2, 3, 17, 90, 96)], width),
        "periodic": batch([[1, 2, 3] * 30, [1, 2] * 47, [5, 5, 6] * 31 + [5]], width),
        "fibonacci and de bruijn": batch([fibonacci_word(90), de_bruijn(2, 6), de_bruijn(4, 3)], width),
        "empty and short": batch([[], [3], [3, 3], [3, 4], [3, 4, 3]], width),
        "full to the width": batch([[1, 2, 3, 4] * 24, ([8, 9] * 48)[:95], ([8, 9] * 48)[:94]], width),
        "nothing repeats": batch([list(range(90)), list(range(95, 0, -1))], width),
        "rows out of order, twice, out of bounds": batch(
            [[1, 2, 3, 1, 2], [4, 5, 4], [6, 6, 6, 6]], width, rows=[2, 0, 0, -1, 3, 1], active=[1, 1, 0, 1, 1, 2]
        ),
        "extreme ids": batch([[2**31 - 1, 0, 2**31 - 1], [0, 0, 0], [2**31 - 1] * 5], width),
        "votes that part": batch([[1, 2, 9, 4, 1, 2, 9, 5, 1, 2, 8, 4, 1, 2, 9, 6, 1, 2]], width),
        "lengths beyond the width and below zero": batch([[1, 2, 1]], 3)._replace(
            tokens=np.array([[1, 2, 1], [4, 4, 4]], np.int32),
            lengths=np.array([9, -1], np.int32),
            rows=np.array([0, 1], np.int64),
            active=np.array([1, 1], np.int32),
        ),
    }


def random_batch(generator, rows=6, width=80):
    """Texts over alphabets from 1 to 50 tokens, of lengths up to the width."""
    texts = []
    for _ in range(rows):
        alphabet = int(generator.choice([1, 2, 3, 8, 50]))
        texts.append(generator.integers(0, alphabet, int(generator.integers(0, width + 1))).tolist())
    return batch(texts, width, generator.permutation(rows), generator.integers(0, 4, rows).clip(max=1))

"""A fingerprint of a span of tokens that grows with the text: the sum of a well-mixed word for each (token, place)."""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32

TOKEN = np.uint64(0xFF51AFD7ED558CCD)
PLACE = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xC4CEB9FE1A85EC53)
ONE = np.uint64(1)
HIGH = np.uint64(32)
LOW = np.uint64(29)


@kernel
def fingerprint(row: Int32, start: int, stop: int) -> np.uint64:
    """Return the fingerprint of `row[start:stop]` at its place, uint64.

    `fingerprint(row, 0, c) == fingerprint(row, 0, b) + fingerprint(row, b, c)` modulo 2**64, so a text's fingerprint
    grows in O(1) a token, and a whole one is a loop without a chain of dependences, which vectorises: 0.1 to 0.5 ns a
    token. Two different spans of equal place and length have the same fingerprint with a probability of about 2**-64.
    """
    span = row[start:stop]
    place = np.uint64(start) * PLACE
    total = np.uint64(0)
    for i in range(span.shape[0]):
        word = ((np.uint64(span[i]) + ONE) * TOKEN) ^ (place + np.uint64(i) * PLACE)
        word ^= word >> HIGH
        word *= MIX
        word ^= word >> LOW
        total += word
    return total

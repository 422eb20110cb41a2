"""Initial guesses for fixed-point iteration: tokens of the prompt, or any tokens, by a hash in place of chance.

A hash of the length of the text and the position makes a sequence's guesses a function of its text alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins.slots import grown
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

SAMPLE = 64


class Samples(NamedTuple):
    """Prompt tokens to guess from, for each slot.

    Attributes:
        tokens: int32 `(slots, SAMPLE)`, the prompt's last ones.
        size: int32 `(slots,)`, how many.
        length: int64 `(slots,)`, tokens of the text so far.
        started: int32 `(slots,)`, 1 since the first draft: what comes now is no prompt.
        highest: int64 `(1,)`, the highest token id of any text so far.
    """

    tokens: Int32
    size: Int32
    length: Int64
    started: Int32
    highest: Int64


def new_samples(slots: int) -> Samples:
    """Samples of `slots` texts with no token yet."""
    return Samples(
        np.zeros((slots, SAMPLE), np.int32),
        np.zeros(slots, np.int32),
        np.zeros(slots, np.int64),
        np.zeros(slots, np.int32),
        np.zeros(1, np.int64),
    )


def grown_samples(samples: Samples, slots: int) -> Samples:
    """`samples` with room for at least `slots` texts."""
    return Samples(
        grown(samples.tokens, slots),
        grown(samples.size, slots),
        grown(samples.length, slots),
        grown(samples.started, slots),
        samples.highest,
    )


def start_samples(samples: Samples, slots: Int64) -> None:
    """Begin new texts in `slots`."""
    for array in (samples.size, samples.length, samples.started):
        array[slots] = 0


@kernel
def note_token(samples: Samples, slot: int, token: int) -> None:
    """Take in the next token of a text."""
    if samples.started[slot] == 0:
        samples.tokens[slot, samples.length[slot] % SAMPLE] = token
        samples.size[slot] = min(samples.size[slot] + 1, SAMPLE)
    samples.length[slot] += 1
    samples.highest[0] = max(samples.highest[0], token)


@kernel
def guess(samples: Samples, slot: int, position: int, anything: bool) -> int:
    """A token for the place `position` tokens behind the text: of the prompt (0 if it is empty), or `anything`."""
    mixed = np.uint64(samples.length[slot]) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(position)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    chance = np.int64(mixed >> np.uint64(33))
    if anything:
        return chance % (samples.highest[0] + 1)
    return samples.tokens[slot, chance % samples.size[slot]] if samples.size[slot] > 0 else 0

"""Replies of this process, in two generations of bounded size: when the young one is full, the old one goes.

A reply is a strand of the young generation's automaton (`growth.learn_strand`). Where several are being written, each
is taken in as it grows, so that they can be drafted from one another; one that is alone when it has ended. What a reply
repeats of itself then counts twice, in its own text and here, which the mixer learns to weigh.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins.evidence import SEPARATOR
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.edges import STATE_WORDS
from freedraft.retrieval.errors import CapacityError
from freedraft.retrieval.growth import HEAD_LENGTH, HEAD_ROOT, learn_strand, text_at
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

GENERATIONS = 2
NONE = -1
AT_ONCE = 32
"""Tokens of a reply that are taken in behind one step, at most, while it is written."""
MOST_WRITTEN = 64
"""Replies of one call that are taken in while they are written; of more, each is when it has ended."""


class TakenIn(NamedTuple):
    """How much of a sequence's reply is in the young generation, by slot.

    Attributes:
        strand: int64 `(slots,)`, the state of what is, `NONE` where nothing is yet.
        length: int64 `(slots,)`, the length of the sequence's text up to there, where something is.
    """

    strand: Int64
    length: Int64


def nothing_taken_in() -> TakenIn:
    """Room for no sequence."""
    return TakenIn(np.zeros(0, np.int64), np.zeros(0, np.int64))


class Responses:
    """Replies, kept in two of the automata that the sequences live in.

    Attributes:
        enabled: whether any are kept.
        slots: int64 `(GENERATIONS,)`, the young generation's slot and the old one's, `NONE` where there is none.
    """

    def __init__(self, automata: SuffixAutomata, limit: int) -> None:
        """Keep up to `limit` tokens a generation; 0 = keep none."""
        self.enabled = limit > 0
        self.slots: Int64 = np.full(GENERATIONS, NONE, np.int64)
        self._automata = automata
        self._limit = limit
        if self.enabled:
            self.slots[0] = self._new()

    @property
    def beginning(self) -> Int64:
        """Cursors at the empty context of each generation; int64 `(GENERATIONS, 2)`."""
        cursors = np.zeros((GENERATIONS, 2), np.int64)
        for i, slot in enumerate(self.slots):
            if slot != NONE:
                cursors[i, 0] = self._automata.arrays.sequences[slot, HEAD_ROOT]
        return cursors

    @property
    def full(self) -> bool:
        """Whether the young generation holds as much as it may."""
        return self.enabled and bool(self._automata.arrays.sequences[self.slots[0], HEAD_LENGTH] >= self._limit)

    def add(self, slots: Int64, started: Int64, taken_in: TakenIn) -> None:
        """Take in what is left of the replies in `slots`, which have ended.

        Args:
            slots: int64 `(n,)`.
            started: int64 `(n,)`, the length at which each reply began; one that never did, below 0, is none.
            taken_in: brought up to date.
        """
        automata = self._automata
        end_replies(
            automata._words, automata._pool, automata._next_page, automata._sequences, int(self.slots[0]), slots,
            started, taken_in,
        )  # fmt: skip

    def rotate(self, taken_in: TakenIn) -> bool:
        """Begin a new generation if the young one is full, or learns no more, and there is room for another.

        The old one goes first, to make that room.

        Returns:
            True if so: cursors in the young one are then the old one's.
        """
        if not self.enabled:
            return False
        young = self.slots[:1]
        if not self.full and self._automata.learning(young)[0]:
            return False
        if self.slots[1] != NONE:
            self._automata.close(self.slots[1:].copy())
            self.slots[1] = NONE
        new = self._new()
        if new == NONE:
            # All memory is the sequences': better one generation that is full than none.
            return False
        self.slots[1], self.slots[0] = self.slots[0], new
        # What is being written goes on in the new one.
        taken_in.strand[taken_in.strand != NONE] = self.beginning[0, 0]
        return True

    def _new(self) -> int:
        """A text of nothing; `NONE` where there is no room for it."""
        try:
            slots = self._automata.open(np.empty(0, np.int32), np.zeros(2, np.int64))
        except CapacityError:
            return NONE
        if not self._automata.learning(slots)[0]:
            self._automata.close(slots)
            return NONE
        return int(slots[0])


@kernel
def take_in(
    words: Int32,
    states: Int32,
    edges: Int32,
    pool: Int32,
    next_page: Int32,
    sequences: Int32,
    young: int,
    slot: int,
    started: int,
    taken_in: TakenIn,
    most: int,
) -> None:
    """Take up to `most` tokens of a reply, which began at length `started`, into the young generation."""
    own, header = sequences[slot], sequences[young]
    if taken_in.strand[slot] == NONE:
        taken_in.strand[slot] = header[HEAD_ROOT]
        taken_in.length[slot] = started
    end = min(own[HEAD_LENGTH], taken_in.length[slot] + most)
    for position in range(taken_in.length[slot], end):
        token = text_at(words, own, position)
        strand = learn_strand(words, states, edges, pool, next_page, header, taken_in.strand[slot], token)
        if strand == 0:
            break
        taken_in.strand[slot] = strand
        taken_in.length[slot] = position + 1


@kernel
def end_replies(
    words: Int32,
    pool: Int32,
    next_page: Int32,
    sequences: Int32,
    young: int,
    slots: Int64,
    started: Int64,
    taken_in: TakenIn,
) -> None:
    """Take in what is left of replies, and the end of each that is not empty; see `Responses.add`."""
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    header = sequences[young]
    for i in range(len(slots)):
        slot = slots[i]
        if started[i] >= 0:
            whole = sequences[slot, HEAD_LENGTH]
            take_in(words, states, edges, pool, next_page, sequences, young, slot, started[i], taken_in, whole)
            if taken_in.length[slot] > started[i]:
                learn_strand(words, states, edges, pool, next_page, header, taken_in.strand[slot], SEPARATOR)
        taken_in.strand[slot] = NONE


@kernel
def copy_text(words: Int32, sequences: Int32, slot: int, start: int) -> Int32:
    """The learnt text of a slot from `start` on, with a separator after it; empty for a slot out of range."""
    if slot < 0 or slot >= len(sequences):
        return np.empty(0, np.int32)
    header = sequences[slot]
    length = max(0, header[HEAD_LENGTH] - start)
    text = np.empty(length + 1, np.int32)
    for i in range(length):
        text[i] = text_at(words, header, start + i)
    text[length] = SEPARATOR
    return text


@kernel
def end_of_text(words: Int32, sequences: Int32, slot: int, most: int) -> Int32:
    """The last `most` tokens of a slot's learnt text; fewer if it has no more."""
    header = sequences[slot]
    length = header[HEAD_LENGTH]
    text = np.empty(min(length, most), np.int32)
    for i in range(len(text)):
        text[i] = text_at(words, header, length - len(text) + i)
    return text

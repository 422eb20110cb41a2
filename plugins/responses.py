"""Earlier replies of this process, in two generations of bounded size: when the young one is full, the old one goes."""

from __future__ import annotations

import numpy as np

from freedraft.plugins.evidence import SEPARATOR
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.growth import HEAD_LENGTH, HEAD_ROOT, text_at
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

GENERATIONS = 2
NONE = -1


class Responses:
    """Replies, kept as two texts in the automata that the sequences live in.

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

    def add(self, slots: Int64, started: Int64) -> None:
        """Take in what the texts in `slots` hold from `started` on; a text that never started has no reply."""
        arrays = self._automata.arrays
        for slot, start in zip(slots, started, strict=True):
            if start >= 0:
                reply = copy_text(arrays.words, arrays.sequences, slot, start)
                if len(reply) > 1:
                    self._automata.extend(self.slots[:1], reply, np.array([0, len(reply)]))

    def rotate(self) -> bool:
        """Begin a new generation if the young one is full; True if so. Cursors in it are then the old one's."""
        if not self.enabled:
            return False
        young = self.slots[:1]
        if self._automata.lengths(young)[0] < self._limit and self._automata.learning(young)[0]:
            return False
        if self.slots[1] != NONE:
            self._automata.close(self.slots[1:].copy())
        self.slots[1] = self.slots[0]
        self.slots[0] = self._new()
        return True

    def _new(self) -> int:
        return int(self._automata.open(np.empty(0, np.int32), np.zeros(2, np.int64))[0])


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

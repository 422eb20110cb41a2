"""What drafters over a sequence's own text share: they keep its suffix automaton and read it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import ByteSize, Field

from freedraft.plugins.base import Drafts, Feedback, FeedbackKind, Source
from freedraft.plugins.config import DrafterSettings
from freedraft.plugins.slots import check_one_each
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.growth import BAD_SLOT
from freedraft.retrieval.ragged import Int32, Int64

# As a plain number: an enum member costs a microsecond to convert, at every step.
OWN_TEXT = int(Source.OWN_TEXT)


# A context of m tokens gets ESCAPE / m escape counts. Of 0.5 to 6, 3 had the least log loss on text that is nobody's
# benchmark, 330,000 tokens of the Python standard library's sources and of packages' descriptions: there, what had
# followed once was right after 1, 2, 4, 8 and 20 matched tokens in 20, 46, 63, 81 and 85 % of cases, and this gives
# 25, 40, 57, 73 and 87 %.
ESCAPE = 3.0


class OwnTextSettings(DrafterSettings):
    """Settings of the memory that the automata of all sequences share."""

    memory: ByteSize = Field(
        ByteSize(2**30),
        ge=2**20,
        le=2**33,
        description="Bytes that all sequences' automata may take together, about 60 a token; the system hands them out "
        "as they are used. A sequence that finds none left stops learning, and drafts from what it has.",
    )
    max_length: int = Field(2**20, ge=1, le=2**23, description="Tokens that one sequence learns before it stops.")


class OwnText:
    """The half of a drafter that keeps the automata: `open`, `extend`, `close`, and no wish for feedback."""

    feedback: ClassVar[frozenset[FeedbackKind]] = frozenset()

    def __init__(self, settings: OwnTextSettings) -> None:
        self.automata = SuffixAutomata(memory=int(settings.memory), max_length=settings.max_length)

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`; errors as `SuffixAutomata.open`."""
        return self.automata.open(prompts, offsets)

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`; errors as `SuffixAutomata.extend`."""
        self.automata.extend(slots, tokens, offsets)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """Nothing to learn: the committed text says it all."""

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`; errors as `SuffixAutomata.close`."""
        self.automata.close(slots)


def chains(kernel: Any, automata: SuffixAutomata, slots: Int64, budget: Int32, longest: int, *options: Any) -> Drafts:
    """Run a kernel that writes one chain a sequence, and wrap what it wrote.

    The kernels take their arrays one by one: unpacking a named tuple of four would cost 0.8 us a call, of about 5 that
    a step takes for one sequence.

    Args:
        kernel: `kernel(words, sequences, slots, budget, longest, tokens, parents, probability, offsets, *options)`; it
            fills the ragged arrays from the left.
        longest: no row is longer, whatever its budget.

    Raises:
        InputError: a slot that is not open, or not one budget a slot.
    """
    check_one_each("budget", len(budget), slots)
    arrays = automata.arrays
    rows = len(slots)
    space = rows * longest
    tokens = np.empty(space, np.int32)
    parents = np.empty(space, np.int32)
    probability = np.empty(space, np.float32)
    offsets = np.empty(rows + 1, np.int64)
    status = kernel(
        arrays.words, arrays.sequences, slots, budget, longest, tokens, parents, probability, offsets, *options
    )
    if status == BAD_SLOT:
        raise InputError(f"slots: expected open ones, got {slots}")
    used = int(offsets[rows])
    source = np.empty(used, np.uint8)
    source.fill(OWN_TEXT)
    return Drafts(tokens[:used], parents[:used], probability[:used], source, offsets)

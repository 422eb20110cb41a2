"""The corpus drafter: the likeliest continuation in the documents of indexes on disk."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from freedraft.plugins.base import Drafts, Feedback, FeedbackKind, Source
from freedraft.plugins.config import DrafterSettings
from freedraft.plugins.indexes import open_segments
from freedraft.plugins.slots import Slots, check_one_each, checked_tokens, grown
from freedraft.retrieval.index.continuation import continue_one
from freedraft.retrieval.index.follow import AT_OPEN, CURSOR_FIELDS, DAMAGED, FINE, Automaton
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64, as_offsets


class CorpusSettings(DrafterSettings):
    """Settings of `corpus`."""

    index: str | list[str] = Field(description="Folder of an index, or several, as `freedraft index build` made them.")
    tokenizer: str | None = Field(
        None,
        description="The model's tokenizer.json, its folder, or its name if it is in the Hugging Face cache. If given, "
        "indexes built with another tokenizer are refused; otherwise they must only agree with each other.",
    )
    max_tokens: int = Field(12, ge=1, le=128, description="Tokens of a draft, at most.")
    min_match: int = Field(
        2, ge=1, le=2**20, description="Draft only after a suffix of this many tokens that the index knows."
    )
    min_probability: float = Field(
        0.1, ge=0, le=1, description="End a draft where the probability that all of it is accepted falls below this."
    )
    min_expected: float = Field(
        0.8, ge=0, description="Draft only where at least this many draft tokens are expected to be accepted."
    )


class Corpus:
    """Drafts the most frequent continuation of the longest suffixes that the documents of an index know.

    It follows each sequence through every segment's automaton, O(1) amortised a token and segment. The draft is that of
    the segment which expects most accepted tokens. Indexes are mapped, read-only: a machine's processes share them.

    A token that followed a context of m tokens b of n times has probability b / (n + e / m), as in `suffix_automaton`,
    with an escape e of its own (`continuation.ESCAPE`).

    Raises:
        CorpusIndexError: an index is missing or damaged.
        TokenizerMismatchError: an index was built with another tokenizer than the model's, or than another index.
    """

    Settings: ClassVar[type[CorpusSettings]] = CorpusSettings
    feedback: ClassVar[frozenset[FeedbackKind]] = frozenset()

    def __init__(self, settings: CorpusSettings) -> None:
        self.settings = settings
        self._segments = open_segments(settings.index, settings.tokenizer)
        self._slots = Slots()
        self._cursors = [np.zeros((0, CURSOR_FIELDS), np.int32) for _ in self._segments]

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`."""
        tokens = checked_tokens(prompts, "prompts")
        offsets = as_offsets(offsets, len(tokens))
        slots = self._slots.take(len(offsets) - 1)
        for i, cursors in enumerate(self._cursors):
            self._cursors[i] = grown(cursors, self._slots.capacity)
            self._cursors[i][slots] = 0
            self._cursors[i][slots, AT_OPEN] = 1
        self.extend(slots, tokens, offsets)
        return slots

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`.

        Raises:
            DamagedError: a segment is damaged.
        """
        slots = self._slots.checked(slots)
        tokens = checked_tokens(tokens)
        offsets = as_offsets(offsets, len(tokens), len(slots))
        for segment, cursors in zip(self._segments, self._cursors, strict=True):
            segment.advance(cursors, slots, tokens, offsets)

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`: one chain a sequence.

        Raises:
            DamagedError: a segment is damaged.
        """
        slots = self._slots.checked(slots)
        check_one_each("budget", len(budget), slots)
        chosen = self.settings
        best = Chains.none(len(slots), chosen.max_tokens)
        for segment, cursors in zip(self._segments, self._cursors, strict=True):
            found = Chains.none(len(slots), chosen.max_tokens)
            status = continue_batch(
                segment.automaton,
                cursors,
                slots,
                budget,
                chosen.min_match,
                chosen.min_probability,
                found.tokens,
                found.probability,
                found.lengths,
            )
            if status == DAMAGED:
                raise segment.damaged()
            best.take_better(found)
        return best.as_drafts(chosen.min_expected)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """Nothing to learn: the committed text says it all."""

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`."""
        self._slots.release(slots)


class Chains:
    """A chain a sequence, in arrays of equal rows.

    Attributes:
        tokens: int32 `(n, longest)`.
        probability: float32 `(n, longest)`, 0 beyond a chain's end.
        lengths: int64 `(n,)`.
    """

    def __init__(self, tokens: Int32, probability: Float32, lengths: Int64) -> None:
        self.tokens = tokens
        self.probability = probability
        self.lengths = lengths

    @staticmethod
    def none(rows: int, longest: int) -> Chains:
        """No chain for any row."""
        return Chains(
            np.zeros((rows, longest), np.int32), np.zeros((rows, longest), np.float32), np.zeros(rows, np.int64)
        )

    def take_better(self, other: Chains) -> None:
        """For each row, keep the chain that expects more accepted tokens; of equals its own."""
        better = other.probability.sum(axis=1) > self.probability.sum(axis=1)
        for mine, theirs in (
            (self.tokens, other.tokens),
            (self.probability, other.probability),
            (self.lengths, other.lengths),
        ):
            mine[better] = theirs[better]

    def as_drafts(self, min_expected: float) -> Drafts:
        """Those chains that expect at least this many accepted tokens."""
        lengths = np.where(self.probability.sum(axis=1) >= min_expected, self.lengths, 0)
        places = np.arange(self.tokens.shape[1])
        kept: NDArray[np.bool_] = places < lengths[:, None]
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        parents = np.broadcast_to(places - 1, self.tokens.shape)[kept].astype(np.int32)
        source = np.full(len(parents), Source.CORPUS, np.uint8)
        return Drafts(self.tokens[kept], parents, self.probability[kept], source, offsets)


@kernel
def continue_batch(
    automaton: Automaton,
    cursors: Int32,
    slots: Int64,
    budget: Int32,
    min_match: int,
    min_probability: float,
    tokens: Int32,
    probability: Float32,
    lengths: Int64,
) -> int:
    """Write the continuation of each sequence in one segment; the arrays are those of `Chains`, of no chains yet.

    Returns:
        FINE or DAMAGED.
    """
    text, nodes, edges = automaton
    best = np.empty(CURSOR_FIELDS, np.int32)
    for row in range(len(slots)):
        written = continue_one(
            text,
            nodes,
            edges,
            cursors[slots[row]].copy(),
            best,
            min(tokens.shape[1], budget[row]),
            min_match,
            min_probability,
            tokens[row],
            probability[row],
        )
        if written < 0:
            return DAMAGED
        lengths[row] = written
    return FINE

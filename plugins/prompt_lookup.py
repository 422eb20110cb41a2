"""Prompt lookup: copy what followed an earlier occurrence of the n-gram that ends the text."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from freedraft.plugins.base import Drafts
from freedraft.plugins.own_text import ESCAPE, OwnText, OwnTextSettings, chains
from freedraft.retrieval.edges import BEST_BITS, LENGTH, LINK, ORIGIN, RECENT, STATE_WORDS
from freedraft.retrieval.growth import BAD_SLOT, FINE, HEAD_LENGTH, HEAD_MATCH, HEAD_MATCH_LENGTH, is_open, text_at
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64


class PromptLookupSettings(OwnTextSettings):
    """Settings of `prompt_lookup`."""

    max_tokens: int = Field(10, ge=1, le=128, description="Tokens of a draft, at most.")
    min_match: int = Field(2, ge=1, le=2**20, description="The shortest n-gram that may be looked up.")
    max_match: int = Field(5, ge=1, le=2**20, description="The longest; the longest that occurred before is used.")
    occurrence: Literal["recent", "earliest"] = Field(
        "recent", description="Which occurrence to copy from: the most recent, or the earliest (as transformers does)."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_match > self.max_match:
            raise ValueError(f"min_match must not exceed max_match ({self.max_match})")
        return self


class PromptLookup(OwnText):
    """Drafts by prompt lookup (Saxena 2023), on the suffix automaton: O(1) in the length of the text.

    The n-gram is the longest of `min_match` to `max_match` tokens that ends the text and occurred before. What followed
    that occurrence is copied; a copy that reaches the end of the text goes on into what it has copied, as in LZ77.

    Its probabilities are those of one occurrence in `suffix_automaton`: a copy that has matched m tokens is right about
    the next with probability 1 / (1 + ESCAPE / m).
    """

    Settings: ClassVar[type[PromptLookupSettings]] = PromptLookupSettings

    def __init__(self, settings: PromptLookupSettings) -> None:
        super().__init__(settings)
        self.settings = settings

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`: one chain a sequence."""
        chosen = self.settings
        earliest = chosen.occurrence == "earliest"
        return chains(
            copy_batch, self.automata, slots, budget, chosen.max_tokens, chosen.min_match, chosen.max_match, earliest
        )


@kernel
def copy_batch(
    words: Int32,
    sequences: Int32,
    slots: Int64,
    budget: Int32,
    longest: int,
    tokens: Int32,
    parents: Int32,
    probability: Float32,
    offsets: Int64,
    min_match: int,
    max_match: int,
    earliest: bool,
) -> int:
    """Write the copy for each sequence; see `own_text.chains`."""
    states = words.reshape(-1, STATE_WORDS)
    used = 0
    offsets[0] = 0
    for row in range(len(slots)):
        if not is_open(sequences, slots[row]):
            return BAD_SLOT
        header = sequences[slots[row]]
        matched = min(header[HEAD_MATCH_LENGTH], max_match)
        if matched >= min_match:
            state = header[HEAD_MATCH]
            while states[states[state, LINK], LENGTH] >= matched:
                state = states[state, LINK]
            end = states[state, ORIGIN] >> BEST_BITS if earliest else states[state, RECENT]
            length = header[HEAD_LENGTH]
            likelihood = 1.0
            for i in range(min(longest, budget[row])):
                at = end + 1 + i
                tokens[used] = text_at(words, header, at) if at < length else tokens[used - (length - end - 1)]
                parents[used] = i - 1
                likelihood /= 1.0 + ESCAPE / (matched + i)
                probability[used] = np.float32(likelihood)
                used += 1
        offsets[row + 1] = used
    return FINE

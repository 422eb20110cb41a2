"""The suffix-automaton drafter: the likeliest continuation of the longest suffix that occurred before."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from freedraft.plugins.base import Drafts
from freedraft.plugins.own_text import ESCAPE, OwnText, OwnTextSettings, chains
from freedraft.retrieval.contexts import likeliest_times
from freedraft.retrieval.edges import COUNT, LENGTH, LINK, NO_TOKEN, STATE_WORDS, TARGET, TOKEN
from freedraft.retrieval.growth import BAD_SLOT, FINE, HEAD_MATCH, HEAD_MATCH_LENGTH, is_open
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64

CONTEXTS_TRIED = 4


class SuffixAutomatonSettings(OwnTextSettings):
    """Settings of `suffix_automaton`."""

    max_tokens: int = Field(12, ge=1, le=128, description="Tokens of a draft, at most (static termination).")
    min_match: int = Field(
        1, ge=1, le=2**20, description="Draft only after a suffix of this many tokens that occurred before."
    )
    min_probability: float = Field(
        0.1, ge=0, le=1, description="End a draft where the probability that all of it is accepted falls below this."
    )
    tokens_per_match: float | None = Field(
        None,
        gt=0,
        le=128,
        description="At most this many draft tokens for each matched token, as suffix decoding limits them.",
    )
    min_expected: float = Field(
        0.8,
        ge=0,
        description="Draft only where at least this many draft tokens are expected to be accepted. 0.8 suits a CPU, "
        "where a verified draft costs 1.6 to 1.8 times a plain step; on a GPU with room to spare, 0 is right.",
    )


class SuffixAutomaton(OwnText):
    """Drafts the most frequent continuation of the longest suffix that occurred before, token by token.

    Like SuffixDecoding (Oliaro et al. 2025, section 3) it weighs continuations by how often they followed, but on an
    online suffix automaton, so a step costs the same in any length of text. Of the longest few nested contexts it
    starts from the one that predicts its next token best.

    A token that followed a context b of n times, the context being m tokens long, is given probability
    b / (n + ESCAPE / m): an escape count (Cleary and Witten 1984, "Data compression using adaptive coding and partial
    string matching") that shrinks as the match grows.
    """

    Settings: ClassVar[type[SuffixAutomatonSettings]] = SuffixAutomatonSettings

    def __init__(self, settings: SuffixAutomatonSettings) -> None:
        super().__init__(settings)
        self.settings = settings

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`: one chain a sequence."""
        chosen = self.settings
        return chains(
            follow_batch,
            self.automata,
            slots,
            budget,
            chosen.max_tokens,
            chosen.min_match,
            chosen.min_probability,
            chosen.tokens_per_match or 0.0,
            chosen.min_expected,
        )


@kernel
def follow_batch(
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
    min_probability: float,
    tokens_per_match: float,
    min_expected: float,
) -> int:
    """Write the continuation of each sequence; see `own_text.chains`. `tokens_per_match` 0 = no such limit."""
    states = words.reshape(-1, STATE_WORDS)
    used = 0
    offsets[0] = 0
    for row in range(len(slots)):
        if not is_open(sequences, slots[row]):
            return BAD_SLOT
        header = sequences[slots[row]]
        state = header[HEAD_MATCH]
        matched = header[HEAD_MATCH_LENGTH]
        best_state, best_matched, best_likelihood = 0, 0, 0.0
        for _ in range(CONTEXTS_TRIED):
            if state == 0 or matched < min_match:
                break
            if states[state, COUNT] != 0:
                likelihood = likeliest_times(states, header, state) / (states[state, COUNT] + ESCAPE / matched)
                if likelihood > best_likelihood:
                    best_state, best_matched, best_likelihood = state, matched, likelihood
            state = states[state, LINK]
            matched = states[state, LENGTH]
        state, matched = best_state, best_matched
        most = min(longest, budget[row])
        if tokens_per_match > 0.0:
            most = min(most, int(tokens_per_match * matched))
        start = used
        likelihood, expected = 1.0, 0.0
        while state != 0 and used - start < most:
            likelihood *= min(1.0, likeliest_times(states, header, state) / (states[state, COUNT] + ESCAPE / matched))
            if likelihood < min_probability:
                break
            tokens[used] = states[state, TOKEN]
            parents[used] = used - start - 1
            probability[used] = np.float32(likelihood)
            expected += likelihood
            used += 1
            state = states[state, TARGET]
            matched += 1
            # The end of the text has no continuation yet; a shorter suffix of it has.
            while state != 0 and states[state, TOKEN] == NO_TOKEN:
                state = states[state, LINK]
                matched = states[state, LENGTH]
            if matched == 0:
                break
        if expected < min_expected:
            used = start
        offsets[row + 1] = used
    return FINE

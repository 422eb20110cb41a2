"""Fusion: several texts, one calibrated draft."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from freedraft.plugins import mixing
from freedraft.plugins.base import Drafts, Feedback, FeedbackKind, Source
from freedraft.plugins.evidence import (
    COLUMNS,
    KIND,
    LIKELIEST,
    MAX_CONTEXTS,
    OWN,
    RESPONSES,
    advance,
    gather,
    root_of,
    settle,
)
from freedraft.plugins.mixing import Candidates, Mixer, correct, learn, learn_correction, predict, room
from freedraft.plugins.own_text import OwnTextSettings
from freedraft.plugins.responses import GENERATIONS, Responses
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.edges import STATE_WORDS
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.growth import (
    BAD_SLOT,
    BAD_TOKEN,
    FINE,
    HEAD_LEARNING,
    HEAD_LENGTH,
    HEAD_MATCH,
    HEAD_MATCH_LENGTH,
    follow_token,
    is_open,
    learn_token,
)
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64, UInt8, as_offsets, as_tokens

# A cursor is followed through other texts by this many tokens of a prompt's end; more would only lengthen the start.
PROMPT_TAIL = 64
NOT_STARTED = -1

SOURCES = np.array([Source.OWN_TEXT, Source.RESPONSES, Source.CORPUS, Source.REFERENCE], np.uint8)


class FusionSettings(OwnTextSettings):
    """Settings of `fusion`."""

    max_tokens: int = Field(16, ge=1, le=128, description="Tokens of a draft, at most.")
    min_probability: float = Field(
        0.05, ge=0, le=1, description="End a draft where the probability that all of it is accepted falls below this."
    )
    scope: Literal["off", "engine"] = Field(
        "engine",
        description="Whose replies a sequence is drafted from: `off` = its own text alone; `engine` = also the earlier "
        "replies of this process, whoever asked for them. One user's reply can then speed up another's, and so betray "
        "by its timing that it exists: choose `off` where tenants must not learn that of each other.",
    )
    response_tokens: int = Field(
        500_000, ge=1000, le=2**20, description="Tokens of earlier replies a generation holds; there are two."
    )


class Sequences(NamedTuple):
    """What fusion keeps for each slot, beside its automaton.

    Attributes:
        cursors: int64 `(slots, GENERATIONS, 2)`, state and matched tokens in each generation of responses.
        started: int64 `(slots,)`, the length at the first draft: there the reply begins. `NOT_STARTED` until then.
        considered: int64 `(slots,)`, tokens considered in the last draft, the one that ended it included.
        tokens: int32 `(slots, longest + 1)`, these.
        mixed: float32 `(slots, longest + 1)`, their probabilities before the last stage.
    """

    cursors: Int64
    started: Int64
    considered: Int64
    tokens: Int32
    mixed: Float32


class Fusion:
    """Drafts the likeliest continuation by all the evidence there is, with a calibrated probability a token.

    Peers take the longest match, or the best score, or give each source a share. Here the nested contexts of all texts
    are mixed into one probability for each candidate (see `mixing`), learnt online from every token that is committed
    after a sequence's first draft; what came before that is its prompt. Texts: the sequence's own, and earlier replies.
    """

    Settings: ClassVar[type[FusionSettings]] = FusionSettings
    feedback: ClassVar[frozenset[FeedbackKind]] = frozenset()

    def __init__(self, settings: FusionSettings) -> None:
        self.settings = settings
        self.automata = SuffixAutomata(memory=int(settings.memory), max_length=settings.max_length)
        self.mixer = mixing.start()
        self.responses = Responses(self.automata, settings.response_tokens if settings.scope == "engine" else 0)
        self._sequences = _no_sequences(settings.max_tokens)

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`; errors as `SuffixAutomata.open`."""
        prompts = as_tokens(prompts, "prompts")
        offsets = as_offsets(offsets, len(prompts))
        slots = self.automata.open(prompts[:0], np.zeros_like(offsets))
        self._grow(int(slots.max(initial=-1)) + 1)
        kept = self._sequences
        kept.started[slots] = NOT_STARTED
        kept.considered[slots] = 0
        kept.cursors[slots] = self.responses.beginning
        if len(prompts):
            try:
                self.extend(slots, prompts, offsets)
            except InputError:
                self.automata.close(slots)
                raise
        return slots

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`; errors as `SuffixAutomata.extend`."""
        tokens = as_tokens(tokens)
        offsets = as_offsets(offsets, len(tokens), len(slots))
        grown = self.automata
        status = extend_batch(
            grown._words, grown._pool, grown._next_page, grown._sequences,
            self._sequences, self.responses.slots, self.mixer, slots, tokens, offsets,
        )  # fmt: skip
        if status == BAD_SLOT:
            raise InputError(f"slots: expected open ones, got {slots}")
        if status == BAD_TOKEN:
            raise InputError(f"tokens: token ids must not be negative, got {int(tokens.min())}")

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`: one chain a sequence."""
        if len(budget) != len(slots):
            raise InputError(f"budget: expected {len(slots)}, one a slot, got {len(budget)}")
        longest = self.settings.max_tokens
        space = len(slots) * longest
        tokens, parents = np.empty(space, np.int32), np.empty(space, np.int32)
        probability, source = np.empty(space, np.float32), np.empty(space, np.uint8)
        offsets = np.empty(len(slots) + 1, np.int64)
        arrays = self.automata.arrays
        status = draft_batch(
            arrays.words, arrays.sequences, self._sequences, self.responses.slots, self.mixer, SOURCES, slots, budget,
            longest, self.settings.min_probability, tokens, parents, probability, source, offsets,
        )  # fmt: skip
        if status == BAD_SLOT:
            raise InputError(f"slots: expected open ones, got {slots}")
        used = int(offsets[-1])
        return Drafts(tokens[:used], parents[:used], probability[:used], source[:used], offsets)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """Nothing to learn: the committed text says it all."""

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`; the replies become a source for others. Errors as `SuffixAutomata.close`."""
        if self.responses.enabled:
            self.responses.add(slots, self._sequences.started[slots])
        self.automata.close(slots)
        if self.responses.rotate():
            self._sequences.cursors[:, 1] = self._sequences.cursors[:, 0]
            self._sequences.cursors[:, 0] = self.responses.beginning[0]

    def save(self, path: str | Path) -> None:
        """Write what the predictor has learnt to an `.npz` file."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **self.mixer._asdict())

    def load(self, path: str | Path) -> None:
        """Take up what `save` wrote.

        Raises:
            InputError: not such a file, or one of another version's shapes.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                loaded = {name: stored[name] for name in Mixer._fields}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not a saved predictor: {error}") from error
        for name, array in loaded.items():
            expected = getattr(self.mixer, name)
            if array.shape != expected.shape or array.dtype != expected.dtype or not np.isfinite(array).all():
                raise InputError(f"{path}: {name}: expected finite {expected.dtype} {expected.shape}")
        loaded["rates"] = np.clip(loaded["rates"], mixing.LOWEST, 1 - mixing.LOWEST)
        self.mixer = Mixer(**loaded)

    def _grow(self, slots: int) -> None:
        old = self._sequences
        if slots > len(old.started):
            more = max(2 * len(old.started), slots, 16) - len(old.started)
            self._sequences = Sequences(
                *(np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)]) for array in old)
            )


def _no_sequences(longest: int) -> Sequences:
    return Sequences(
        np.zeros((0, GENERATIONS, 2), np.int64),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros((0, longest + 1), np.int32),
        np.zeros((0, longest + 1), np.float32),
    )


@kernel
def gather_all(
    words: Int32, states: Int32, sequences: Int32, generations: Int64, own: Int32, cursors: Int64, evidence: Int64
) -> int:
    """Evidence from all texts; `cursors` int64 `(1 + GENERATIONS, 2)`, the own text's first."""
    rows = gather(words, states, own, OWN, cursors[0, 0], cursors[0, 1], evidence, 0)
    for i in range(len(generations)):
        if generations[i] >= 0:
            header = sequences[generations[i]]
            rows = gather(words, states, header, RESPONSES, cursors[1 + i, 0], cursors[1 + i, 1], evidence, rows)
    return rows


@kernel
def learn_position(
    words: Int32,
    states: Int32,
    edges: Int32,
    sequences: Int32,
    generations: Int64,
    mixer: Mixer,
    own: Int32,
    cursors: Int64,
    evidence: Int64,
    candidates: Candidates,
    token: int,
) -> None:
    """Let the mixer see that `token` was committed where the cursors are."""
    rows = gather_all(words, states, sequences, generations, own, cursors, evidence)
    if rows > 0:
        found = predict(words, states, edges, evidence, rows, mixer, candidates)
        learn(evidence, rows, mixer, candidates, found, token)


@kernel
def extend_batch(
    words: Int32,
    pool: Int32,
    next_page: Int32,
    sequences: Int32,
    kept: Sequences,
    generations: Int64,
    mixer: Mixer,
    slots: Int64,
    tokens: Int32,
    offsets: Int64,
) -> int:
    """Append a ragged batch, learning from it where the reply has begun; FINE, or BAD_SLOT or BAD_TOKEN."""
    for slot in slots:
        if not is_open(sequences, slot):
            return BAD_SLOT
    for token in tokens:
        if token < 0:
            return BAD_TOKEN
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    evidence = np.empty((MAX_CONTEXTS, COLUMNS), np.int64)
    parts = room()
    candidates = Candidates(parts[0], parts[1], parts[2], parts[3])
    cursors = np.empty((1 + GENERATIONS, 2), np.int64)
    for row in range(len(slots)):
        slot = slots[row]
        own = sequences[slot]
        replying = kept.started[slot] >= 0
        judging = replying
        for i in range(GENERATIONS):
            if generations[i] >= 0:
                state, matched = kept.cursors[slot, i, 0], kept.cursors[slot, i, 1]
                cursors[1 + i, 0], cursors[1 + i, 1] = settle(states, state, matched), matched
        for i in range(offsets[row], offsets[row + 1]):
            token = tokens[i]
            if replying:
                depth = i - offsets[row]
                if judging and depth < kept.considered[slot]:
                    judging = kept.tokens[slot, depth] == token
                    learn_correction(mixer, depth, kept.mixed[slot, depth], judging)
                cursors[0, 0], cursors[0, 1] = own[HEAD_MATCH], own[HEAD_MATCH_LENGTH]
                learn_position(
                    words, states, edges, sequences, generations, mixer, own, cursors, evidence, candidates, token
                )
            learning = own[HEAD_LEARNING] != 0
            if not (learning and learn_token(words, states, edges, pool, next_page, own, token)):
                own[HEAD_LEARNING] = 0
                follow_token(words, states, edges, own, token)
            if replying or offsets[row + 1] - i <= PROMPT_TAIL:
                for j in range(GENERATIONS):
                    if generations[j] >= 0:
                        root = root_of(sequences, generations[j])
                        state, matched = advance(
                            words, states, edges, root, cursors[1 + j, 0], cursors[1 + j, 1], token
                        )
                        cursors[1 + j, 0], cursors[1 + j, 1] = state, matched
        kept.cursors[slot] = cursors[1:]
        kept.considered[slot] = 0
    return FINE


@kernel
def draft_batch(
    words: Int32,
    sequences: Int32,
    kept: Sequences,
    generations: Int64,
    mixer: Mixer,
    sources: UInt8,
    slots: Int64,
    budget: Int32,
    longest: int,
    min_probability: float,
    tokens: Int32,
    parents: Int32,
    probability: Float32,
    source: UInt8,
    offsets: Int64,
) -> int:
    """Write the likeliest chain of each sequence; FINE, or BAD_SLOT."""
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    evidence = np.empty((MAX_CONTEXTS, COLUMNS), np.int64)
    parts = room()
    candidates = Candidates(parts[0], parts[1], parts[2], parts[3])
    cursors = np.empty((1 + GENERATIONS, 2), np.int64)
    used = 0
    offsets[0] = 0
    for row in range(len(slots)):
        slot = slots[row]
        if not is_open(sequences, slot):
            return BAD_SLOT
        own = sequences[slot]
        if kept.started[slot] == NOT_STARTED:
            kept.started[slot] = own[HEAD_LENGTH]
        cursors[0, 0], cursors[0, 1] = own[HEAD_MATCH], own[HEAD_MATCH_LENGTH]
        for i in range(GENERATIONS):
            if generations[i] >= 0:
                state, matched = kept.cursors[slot, i, 0], kept.cursors[slot, i, 1]
                cursors[1 + i, 0], cursors[1 + i, 1] = settle(states, state, matched), matched
        likelihood = 1.0
        depth = 0
        most = min(longest, budget[row])
        kept.considered[slot] = 0
        while depth < most:
            rows = gather_all(words, states, sequences, generations, own, cursors, evidence)
            found = 0 if rows == 0 else predict(words, states, edges, evidence, rows, mixer, candidates)
            if found == 0:
                break
            best = 0
            for j in range(1, found):
                if candidates.mixed[j] > candidates.mixed[best]:
                    best = j
            token = candidates.tokens[best]
            kept.tokens[slot, depth] = token
            kept.mixed[slot, depth] = candidates.mixed[best]
            kept.considered[slot] = depth + 1
            likelihood *= correct(mixer, depth, candidates.mixed[best])
            if likelihood < min_probability:
                break
            from_where = OWN
            for i in range(rows):
                if evidence[i, LIKELIEST] == token:
                    from_where = evidence[i, KIND]
                    break
            tokens[used] = token
            parents[used] = depth - 1
            probability[used] = likelihood
            source[used] = sources[from_where]
            used += 1
            depth += 1
            if depth < most:
                state, matched = advance(
                    words, states, edges, root_of(sequences, slot), cursors[0, 0], cursors[0, 1], token
                )
                cursors[0, 0], cursors[0, 1] = state, matched
                for i in range(GENERATIONS):
                    if generations[i] >= 0:
                        root = root_of(sequences, generations[i])
                        state, matched = advance(
                            words, states, edges, root, cursors[1 + i, 0], cursors[1 + i, 1], token
                        )
                        cursors[1 + i, 0], cursors[1 + i, 1] = state, matched
        offsets[row + 1] = used
    return FINE

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
    find_end,
    follow,
    gather,
    root_of,
    settle,
)
from freedraft.plugins.mixing import Candidates, Mixer, correct, learn, learn_correction, predict, room
from freedraft.plugins.mixing_file import read_mixer, write_mixer
from freedraft.plugins.own_text import OwnTextSettings
from freedraft.plugins.responses import GENERATIONS, Responses
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.edges import STATE_WORDS
from freedraft.retrieval.errors import ConfigError, InputError
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

NOT_STARTED = -1

# Bytes of the arena that a token of earlier replies may take, a generous estimate: both generations together are to
# leave half of it to the sequences.
RESPONSE_BYTES = 128

SOURCES = np.array([Source.OWN_TEXT, Source.RESPONSES, Source.CORPUS, Source.REFERENCE], np.uint8)


class FusionSettings(OwnTextSettings):
    """Settings of `fusion`."""

    max_tokens: int = Field(24, ge=1, le=128, description="Tokens of a draft, at most.")
    min_probability: float = Field(
        0.02, ge=0, le=1, description="End a draft where the probability that all of it is accepted falls below this."
    )
    scope: Literal["off", "engine"] = Field(
        "engine",
        description="Whose replies a sequence is drafted from: `off` = its own text alone; `engine` = also the earlier "
        "replies of this process, whoever asked for them. One user's reply can then speed up another's, and so betray "
        "by its timing that it exists: choose `off` where tenants must not learn that of each other.",
    )
    learnt: Path | None = Field(
        None,
        description="A file that `Fusion.save` wrote, to start from what the predictor had learnt by then; it has no "
        "text in it. By default it starts from neutral values, which it leaves behind within some thousand tokens.",
    )
    response_tokens: int = Field(
        500_000,
        ge=1000,
        le=2**20,
        description="Tokens of earlier replies a generation holds, about; there are two. "
        "They live in `memory`, and never plan on more than half of it: with 64 MiB, about 130,000.",
    )


class Sequences(NamedTuple):
    """What fusion keeps for each slot, beside its automaton.

    Attributes:
        cursors: int64 `(slots, GENERATIONS, 2)`, state and matched tokens in each generation of responses, from the
            first draft on.
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
    calibrated: ClassVar[bool] = True
    """Its probabilities are what they say: pacing is on by default."""

    def __init__(self, settings: FusionSettings) -> None:
        self.settings = settings
        self.automata = SuffixAutomata(memory=int(settings.memory), max_length=settings.max_length)
        self.mixer = mixing.start()
        if settings.learnt is not None:
            try:
                self.load(settings.learnt)
            except InputError as error:
                raise ConfigError(f"fusion: learnt: {error}") from error
        room = int(settings.memory) // (2 * GENERATIONS * RESPONSE_BYTES)
        self.responses = Responses(
            self.automata, min(settings.response_tokens, room) if settings.scope == "engine" else 0
        )
        self._sequences = _no_sequences(settings.max_tokens)
        self.floor = 0.0
        """As `min_probability`, set by a runtime that paces: what is below would not be verified."""

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`; errors as `SuffixAutomata.open`."""
        prompts = as_tokens(prompts, "prompts")
        offsets = as_offsets(offsets, len(prompts))
        slots = self.automata.open(prompts[:0], np.zeros_like(offsets))
        self._grow(int(slots.max(initial=-1)) + 1)
        kept = self._sequences
        kept.started[slots] = NOT_STARTED
        kept.considered[slots] = 0
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
            longest, max(self.settings.min_probability, self.floor), tokens, parents, probability, source, offsets,
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
            self.automata.learning(slots)  # raises for a slot that is not open, before anything is taken from it
            if len(np.unique(slots)) != len(slots):
                raise InputError(f"slots: expected distinct ones, got {slots}")
            self.responses.add(slots, self._sequences.started[slots])
        self.automata.close(slots)
        if self.responses.rotate():
            self._sequences.cursors[:, 1] = self._sequences.cursors[:, 0]
            self._sequences.cursors[:, 0] = self.responses.beginning[0]

    def save(self, path: str | Path) -> None:
        """Write what the predictor has learnt to a file; no text, and no token, is in it."""
        write_mixer(self.mixer, Path(path))

    def load(self, path: str | Path) -> None:
        """Take up what `save` wrote.

        Raises:
            InputError: not such a file, or one of another version's shapes.
        """
        self.mixer = read_mixer(Path(path))

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
def take_up(states: Int32, generations: Int64, kept: Int64, cursors: Int64) -> None:
    """Copy a sequence's cursors in the generations, `kept`, to `cursors`, its own text's being first there."""
    for i in range(GENERATIONS):
        if generations[i] >= 0:
            cursors[1 + i, 0], cursors[1 + i, 1] = settle(states, kept[i, 0], kept[i, 1]), kept[i, 1]


@kernel
def follow_all(
    words: Int32, states: Int32, edges: Int32, sequences: Int32, generations: Int64, cursors: Int64, token: int
) -> None:
    """Move the cursors in the generations past a token."""
    for i in range(GENERATIONS):
        if generations[i] >= 0:
            root = root_of(sequences, generations[i])
            state, matched = follow(words, states, edges, root, cursors[1 + i, 0], cursors[1 + i, 1], token)
            cursors[1 + i, 0], cursors[1 + i, 1] = state, matched


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
        if replying:
            take_up(states, generations, kept.cursors[slot], cursors)
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
            if replying:
                follow_all(words, states, edges, sequences, generations, cursors, token)
        if replying:
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
    for slot in slots:
        if not is_open(sequences, slot):
            return BAD_SLOT
    for row in range(len(slots)):
        slot = slots[row]
        own = sequences[slot]
        if kept.started[slot] == NOT_STARTED:
            kept.started[slot] = own[HEAD_LENGTH]
            for i in range(GENERATIONS):
                if generations[i] >= 0:
                    root = root_of(sequences, generations[i])
                    state, matched = find_end(words, states, edges, own, root)
                    kept.cursors[slot, i, 0], kept.cursors[slot, i, 1] = state, matched
        cursors[0, 0], cursors[0, 1] = own[HEAD_MATCH], own[HEAD_MATCH_LENGTH]
        take_up(states, generations, kept.cursors[slot], cursors)
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
                follow_all(words, states, edges, sequences, generations, cursors, token)
        offsets[row + 1] = used
    return FINE

"""Jacobi decoding: draft what the target predicted, at the same places, behind the last draft."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from freedraft.plugins.base import Drafter, Drafts, Feedback, FeedbackKind, Source
from freedraft.plugins.config import DrafterSettings
from freedraft.plugins.guesses import Samples, grown_samples, guess, new_samples, note_token, start_samples
from freedraft.plugins.registry import make_drafter, rehearsed
from freedraft.plugins.slots import Slots, check_one_each, checked_tokens, grown
from freedraft.plugins.verified import FOLLOWED, NO_CHILD, child_with, known_positions
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Float64, Int32, Int64, as_offsets, as_tokens

# Iterates that a token has outlived unchanged, up to this; 0 = an initial guess.
MAX_AGE = 3
MAX_DEPTH = 7
# Before anything is counted, one in so many initial guesses is right; and the weight of that belief.
PRIOR_HITS, PRIOR_TRIALS = 0.2, 4.0
HORIZON = 1024.0


class JacobiSettings(DrafterSettings):
    """Settings of `jacobi`."""

    max_tokens: int = Field(8, ge=1, le=128, description="Tokens that are iterated at once.")
    initial: str = Field(
        "prompt",
        description="Where a guess comes from at a place that has no iterate yet: `prompt`, a token of the prompt; "
        "`random`, any token; or the name of a drafter that needs no feedback, whose draft has that place.",
    )
    initial_settings: dict[str, Any] = Field({}, description="Settings of the drafter in `initial`.")

    def rehearsing(self) -> Self:
        """As `DrafterSettings.rehearsing`, for the drafter in `initial`."""
        if self.initial in ("prompt", "random"):
            return self
        return self.model_copy(update={"initial_settings": rehearsed(self.initial, self.initial_settings)})

    @model_validator(mode="after")
    def _settings_need_a_drafter(self) -> Self:
        if self.initial_settings and self.initial in ("prompt", "random"):
            raise ValueError(f"initial_settings are for a drafter, and initial is {self.initial}")
        return self


class Sequences(NamedTuple):
    """What is kept for each slot.

    Attributes:
        guesses: int32 `(slots, max_tokens)`, the newest iterate, from the next token on.
        age: int32 `(slots, max_tokens)`, for how many iterates each has been the same.
        known: int32 `(slots,)`, the length of the iterate.
        drafted: int32 `(slots,)`, tokens of the last draft, which are then the beginning of `guesses`.
        nodes: int32 `(slots,)`, how many there are in what is verified: the last draft, or another's.
        tokens, parents: int32 `(slots, M)`, these.
        shown: int32 `(slots,)`, verified positions in `argmax`; 0 = no feedback.
        argmax: int32 `(slots, M + 1)`.
    """

    guesses: Int32
    age: Int32
    known: Int32
    drafted: Int32
    nodes: Int32
    tokens: Int32
    parents: Int32
    shown: Int32
    argmax: Int32


class Counts(NamedTuple):
    """How often a guess was right where those before it were, by its age and how many those are.

    Attributes:
        hits: float64 `(MAX_AGE + 1, MAX_DEPTH + 1)`.
        trials: float64, likewise.
    """

    hits: Float64
    trials: Float64


class Jacobi:
    """Drafts what the target predicted for the next places, behind its last draft: Jacobi iteration.

    From Santilli et al. 2023, "Accelerating Transformer Inference for Translation via Parallel Decoding" (arXiv
    2305.10427, section 3.1).

    Greedy decoding of a block of tokens is a system of equations: each token is the target's argmax behind those
    before it. Jacobi iteration guesses all of them and replaces each by the argmax behind the guesses before it, in one
    pass. Here the guesses are the draft of a step, so that verification commits what has settled, and the argmax at
    the other positions, behind the committed tokens, is the next draft.

    Few tokens settle early in free text; it is a source for other drafters more than one of its own.
    """

    Settings: ClassVar[type[JacobiSettings]] = JacobiSettings
    feedback: ClassVar[frozenset[FeedbackKind]] = frozenset({"accepted", "argmax"})

    def __init__(self, settings: JacobiSettings) -> None:
        self.settings = settings
        shape = (MAX_AGE + 1, MAX_DEPTH + 1)
        self.counts = Counts(np.full(shape, PRIOR_HITS), np.full(shape, PRIOR_TRIALS))
        self._slots = Slots()
        self._samples = new_samples(0)
        most = settings.max_tokens
        followed = max(most, FOLLOWED)
        self._sequences = Sequences(
            np.empty((0, most), np.int32),
            np.empty((0, most), np.int32),
            np.empty(0, np.int32),
            np.empty(0, np.int32),
            np.empty(0, np.int32),
            np.empty((0, followed), np.int32),
            np.empty((0, followed), np.int32),
            np.empty(0, np.int32),
            np.empty((0, followed + 1), np.int32),
        )
        self._initial = _initial_drafter(settings)
        self._initial_slots: Int64 = np.empty(0, np.int64)

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`.

        Raises:
            InputError: negative token ids, or offsets that do not fit.
        """
        prompts = checked_tokens(prompts, "prompts")
        offsets = as_offsets(offsets, len(prompts))
        slots = self._slots.take(len(offsets) - 1)
        capacity = self._slots.capacity
        self._sequences = Sequences(*(grown(array, capacity) for array in self._sequences))
        self._samples = grown_samples(self._samples, capacity)
        kept = self._sequences
        for array in (kept.known, kept.drafted, kept.nodes, kept.shown):
            array[slots] = 0
        start_samples(self._samples, slots)
        if self._initial is not None:
            self._initial_slots = grown(self._initial_slots, capacity, -1)
            self._initial_slots[slots] = self._initial.open(prompts, offsets)
        extend_batch(self._sequences, self._samples, self.counts, slots, prompts, offsets)
        return slots

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`.

        Raises:
            InputError: a slot that is not open, negative token ids, or offsets that do not fit.
        """
        slots = self._slots.checked(slots)
        tokens = checked_tokens(tokens)
        offsets = as_offsets(offsets, len(tokens), len(slots))
        if self._initial is not None:
            self._initial.extend(self._initial_slots[slots], tokens, offsets)
        extend_batch(self._sequences, self._samples, self.counts, slots, tokens, offsets)

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`: one chain a sequence.

        Raises:
            InputError: a slot that is not open, or not one budget a slot.
        """
        slots = self._slots.checked(slots)
        check_one_each("budget", len(budget), slots)
        limits = np.clip(budget, 0, self.settings.max_tokens).astype(np.int32)
        if self._initial is None:
            initial = Drafts.empty(len(slots))
        else:
            initial = self._initial.draft(self._initial_slots[slots], limits)
        offsets = np.concatenate([[0], np.cumsum(limits)]).astype(np.int64)
        used = int(offsets[-1])
        tokens, parents = np.empty(used, np.int32), np.empty(used, np.int32)
        probability = np.empty(used, np.float32)
        draft_batch(
            self._sequences, self._samples, self.counts, slots, offsets, self.settings.initial == "random",
            initial.tokens, initial.parents, initial.offsets, tokens, parents, probability,
        )  # fmt: skip
        return Drafts(tokens, parents, probability, np.full(used, Source.BY_PRODUCT, np.uint8), offsets)

    def adopt(self, slots: Int64, drafts: Drafts) -> None:
        """As `FollowsDrafts.adopt`: the next iterate is what the target predicts behind these drafts.

        Raises:
            InputError: a slot that is not open, or not one draft a slot.
        """
        slots = self._slots.checked(slots)
        check_one_each("drafts", drafts.rows, slots)
        adopt_batch(self._sequences, slots, drafts.tokens, drafts.parents, drafts.offsets)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """As `Drafter.observe`: keep the argmax until `extend` has told what was committed.

        Raises:
            InputError: a slot that is not open, no argmax, or shapes that do not fit.
        """
        slots = self._slots.checked(slots)
        if feedback.argmax is None:
            raise InputError("feedback: jacobi needs argmax")
        argmax = as_tokens(feedback.argmax, "argmax")
        offsets = as_offsets(feedback.offsets, len(argmax), len(slots))
        observe_batch(self._sequences, slots, argmax, offsets)

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`.

        Raises:
            InputError: a slot that is not open, or named twice.
        """
        self._slots.release(slots)
        if self._initial is not None:
            self._initial.close(self._initial_slots[slots])


def _initial_drafter(settings: JacobiSettings) -> Drafter | None:
    if settings.initial in ("prompt", "random"):
        return None
    drafter = make_drafter(settings.initial, settings.initial_settings)
    if drafter.feedback:
        raise ConfigError(
            f"initial: {settings.initial} needs feedback on its own drafts; expected prompt, random, or a drafter "
            "that needs none, such as prompt_lookup"
        )
    return drafter


@kernel
def extend_batch(
    sequences: Sequences, samples: Samples, counts: Counts, slots: Int64, tokens: Int32, offsets: Int64
) -> None:
    """Count how the last draft did, and take the next iterate from behind what was committed."""
    for row in range(len(slots)):
        slot = slots[row]
        guesses, age = sequences.guesses[slot], sequences.age[slot]
        drafted = sequences.drafted[slot]
        committed = offsets[row + 1] - offsets[row]
        if sequences.shown[slot] > 0:
            for i in range(min(committed, drafted)):
                at = age[i], min(i, MAX_DEPTH)
                if counts.trials[at] >= HORIZON:
                    counts.trials[at] *= 0.5
                    counts.hits[at] *= 0.5
                counts.trials[at] += 1.0
                if guesses[i] != tokens[offsets[row] + i]:
                    break
                counts.hits[at] += 1.0
        if committed > 0:
            sequences.known[slot] = next_iterate(sequences, slot, tokens[offsets[row] : offsets[row + 1]])
            sequences.shown[slot] = 0
            sequences.drafted[slot] = 0
            sequences.nodes[slot] = 0
        for i in range(offsets[row], offsets[row + 1]):
            note_token(samples, slot, tokens[i])


@kernel
def likeliest_child(sequences: Sequences, slot: int, node: int) -> int:
    """The first of a node's children among what was verified, or -1."""
    for child in range(node + 1, sequences.nodes[slot]):
        if sequences.parents[slot, child] == node:
            return child
    return -1


@kernel
def next_iterate(sequences: Sequences, slot: int, committed: Int32) -> int:
    """Set the guesses to what the target predicted for the places behind what was committed; return how many.

    The node that stands where the last committed token does may have another token: its argmax is the guess all the
    same, as in the definition.
    """
    guesses, age = sequences.guesses[slot], sequences.age[slot]
    tokens, parents = sequences.tokens[slot], sequences.parents[slot]
    drafted, past = sequences.drafted[slot], len(committed)
    node = -1
    for i in range(past):
        following = child_with(tokens, parents, sequences.nodes[slot], node, committed[i])
        if following == NO_CHILD:
            following = likeliest_child(sequences, slot, node)
        if following < 0:
            return 0
        node = following
    known = 0
    while known < len(guesses) and node >= 0 and node + 1 < sequences.shown[slot]:
        token = sequences.argmax[slot, node + 1]
        if token < 0:
            break
        same = past + known < drafted and guesses[past + known] == token
        age[known] = min(age[past + known] + 1, MAX_AGE) if same else 1
        guesses[known] = token
        known += 1
        node = likeliest_child(sequences, slot, node)
    return known


@kernel
def draft_batch(
    sequences: Sequences,
    samples: Samples,
    counts: Counts,
    slots: Int64,
    offsets: Int64,
    anything: bool,
    initial: Int32,
    initial_parents: Int32,
    initial_offsets: Int64,
    tokens: Int32,
    parents: Int32,
    probability: Float32,
) -> None:
    """Write each sequence's iterate, with initial guesses where it ends."""
    for row in range(len(slots)):
        slot = slots[row]
        guesses, age = sequences.guesses[slot], sequences.age[slot]
        samples.started[slot] = 1
        first = initial_offsets[row]
        given = 0
        while first + given < initial_offsets[row + 1] and initial_parents[first + given] == given - 1:
            given += 1
        likelihood = 1.0
        drafted = offsets[row + 1] - offsets[row]
        for i in range(drafted):
            if i >= sequences.known[slot]:
                guesses[i] = initial[first + i] if i < given else guess(samples, slot, i, anything)
                age[i] = 0
            at = age[i], min(i, MAX_DEPTH)
            likelihood *= counts.hits[at] / counts.trials[at]
            tokens[offsets[row] + i] = guesses[i]
            parents[offsets[row] + i] = i - 1
            probability[offsets[row] + i] = np.float32(likelihood)
        sequences.drafted[slot] = drafted
    adopt_batch(sequences, slots, tokens, parents, offsets)


@kernel
def adopt_batch(sequences: Sequences, slots: Int64, tokens: Int32, parents: Int32, offsets: Int64) -> None:
    """Take down what is verified: a ragged batch of drafts, the first nodes of each."""
    for row in range(len(slots)):
        slot, first = slots[row], offsets[row]
        nodes = min(offsets[row + 1] - first, sequences.tokens.shape[1])
        sequences.nodes[slot] = nodes
        sequences.tokens[slot, :nodes] = tokens[first : first + nodes]
        sequences.parents[slot, :nodes] = parents[first : first + nodes]


@kernel
def observe_batch(sequences: Sequences, slots: Int64, argmax: Int32, offsets: Int64) -> None:
    """Keep the argmax of the verified positions of each sequence's last draft."""
    for row in range(len(slots)):
        slot = slots[row]
        shown = known_positions(offsets[row + 1] - offsets[row], sequences.parents[slot], sequences.nodes[slot])
        sequences.shown[slot] = shown
        for i in range(shown):
            sequences.argmax[slot, i] = argmax[offsets[row] + i]

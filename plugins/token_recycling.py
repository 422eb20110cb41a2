"""Token recycling: a tree of the tokens that the target ranked high when it last saw the same context."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import ByteSize, Field

from freedraft.plugins.adjacency import (
    MAX_CONTEXT,
    MAX_TRUST,
    NO_TOKEN,
    TOKENS,
    TRUST,
    Table,
    context_at,
    find_row,
    hash_context,
    learn_next,
    learn_ranked,
    new_table,
    owners,
    push_token,
)
from freedraft.plugins.base import Drafts, Feedback, FeedbackKind, Source
from freedraft.plugins.config import DrafterSettings
from freedraft.plugins.heap import PARENT, TOKEN, Heap, new_heap, pop, push
from freedraft.plugins.slots import Slots, check_one_each, checked_tokens, grown
from freedraft.plugins.verified import known_positions
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Float64, Int32, Int64, as_offsets

# How often a token of each rank was the next one, roughly, before anything is counted; and the weight of that belief.
PRIOR = np.array([0.4, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.008])
PRIOR_WEIGHT = 4.0
# A count that reaches this is halved, so that the estimates follow the text.
HORIZON = 4096.0

# A row's kind: the length of its context, whether a longer context had a row too, its trust, and how many draft tokens
# come before (up to MAX_DEPTH): where the last draft has just failed the next token is harder than behind accepted
# ones.
MAX_DEPTH = 2
KINDS = MAX_CONTEXT * 2 * (MAX_TRUST + 1) * (MAX_DEPTH + 1)


class TokenRecyclingSettings(DrafterSettings):
    """Settings of `token_recycling`."""

    max_tokens: int = Field(60, ge=1, le=256, description="Nodes of a tree, or tokens of a chain, at most.")
    shape: Literal["tree", "chain"] = Field(
        "tree", description="Draft a best-first tree, or only the likeliest chain for a runtime that takes no trees."
    )
    k: int = Field(8, ge=1, le=32, description="Tokens of a row: the target's k likeliest are asked for.")
    context: int = Field(
        3,
        ge=1,
        le=MAX_CONTEXT,
        description="Keep rows for the last 1 to this many tokens. 1 is the adjacency matrix of the paper.",
    )
    fresh: int = Field(
        4,
        ge=1,
        le=32,
        description="How many of the target's newest ranking go before what a row held already; k or more replaces the "
        "whole row, as the paper does.",
    )
    text: bool = Field(
        True, description="Learn also from the prompt, and from committed tokens that came without feedback."
    )
    min_probability: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Draft no token that is accepted with a probability below this; by default 0.002 in a tree and 0.1 "
        "in a chain.",
    )
    scope: Literal["off", "engine"] = Field(
        "engine",
        description="Whose rows a sequence is drafted from: `off` = those of its own text alone; `engine` = all that "
        "this process has learnt, whoever's text it was. By its timing a reply can then betray tokens of another's.",
    )
    memory: ByteSize = Field(
        ByteSize(2**26),
        ge=2**12,
        le=2**33,
        description="Bytes of the table, which all sequences share; the system hands them out as they are used.",
    )


class Counts(NamedTuple):
    """How often the token of each rank was the next one, by kind of row.

    Attributes:
        hits: float64 `(KINDS, k)`.
        trials: float64 `(KINDS,)`.
    """

    hits: Float64
    trials: Float64


class Sequences(NamedTuple):
    """What is kept for each slot.

    Attributes:
        owner: int64 `(slots,)`, of the rows that the sequence reads and writes.
        context: int32 `(slots, MAX_CONTEXT)`, the newest committed tokens, newest first.
        drafted: int32 `(slots,)`, nodes of the last draft.
        tokens: int32 `(slots, max_tokens)`, these.
        parents: int32 `(slots, max_tokens)`, theirs.
        shown: int32 `(slots,)`, verified positions whose ranking waits in `ranked`; 0 = no feedback.
        ranked: int32 `(slots, max_tokens + 1, k)`.
    """

    owner: Int64
    context: Int32
    drafted: Int32
    tokens: Int32
    parents: Int32
    shown: Int32
    ranked: Int32


class Candidates(NamedTuple):
    """What the rows say of the next token; room for the rows of one context.

    Attributes:
        tokens: int32 `(MAX_CONTEXT * k,)`.
        likelihood: float64, likewise.
    """

    tokens: Int32
    likelihood: Float64


class TokenRecycling:
    """Drafts a tree of tokens that the target ranked high when it last saw the same context.

    From Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
    Recycling" (arXiv 2408.08696).

    At every verified position the target ranks all tokens; its k likeliest are kept as the row of the token they
    follow, also where the draft was rejected. The next draft is a tree grown from these rows. What differs from the
    paper: rows are also kept for longer contexts, the longest one known being asked first; the tree is grown
    best-first from probabilities that are counted online, where the paper has one fixed tree; and the rows learn
    the prompt's tokens too. `context=1, fresh=8, text=False` leaves only the tree's shape different.

    A token's probability is the share of cases in which the token of its rank, in a row of its kind, was the next one.

    All sequences share the rows, unless `scope` is `off`. They hold single tokens of each other's text, by which a
    reply can be faster where another user's text had the same words.
    """

    Settings: ClassVar[type[TokenRecyclingSettings]] = TokenRecyclingSettings
    feedback: ClassVar[frozenset[FeedbackKind]] = frozenset({"accepted", "top_k"})

    def __init__(self, settings: TokenRecyclingSettings) -> None:
        self.settings = settings
        self.feedback_top_k = settings.k
        self.table = new_table(int(settings.memory), settings.k)
        self.counts = Counts(np.zeros((KINDS, settings.k)), np.zeros(KINDS))
        self._slots = Slots()
        self._opened = 0
        self._sequences = Sequences(
            np.empty(0, np.int64),
            np.empty((0, MAX_CONTEXT), np.int32),
            np.empty(0, np.int32),
            np.empty((0, settings.max_tokens), np.int32),
            np.empty((0, settings.max_tokens), np.int32),
            np.empty(0, np.int32),
            np.empty((0, settings.max_tokens + 1, settings.k), np.int32),
        )
        most = MAX_CONTEXT * settings.k
        self._candidates = Candidates(np.empty(most, np.int32), np.empty(most))
        room = (settings.max_tokens + 1) * settings.context * settings.k
        self._heap = new_heap(room)
        floor = settings.min_probability
        self._floor = floor if floor is not None else (0.002 if settings.shape == "tree" else 0.1)

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`.

        Raises:
            InputError: negative token ids, or offsets that do not fit.
        """
        prompts = checked_tokens(prompts, "prompts")
        offsets = as_offsets(offsets, len(prompts))
        slots = self._slots.take(len(offsets) - 1)
        self._sequences = Sequences(*(grown(array, self._slots.capacity) for array in self._sequences))
        kept = self._sequences
        kept.owner[slots] = owners(self.settings.scope, self._opened, len(slots))
        self._opened += len(slots)
        kept.context[slots] = NO_TOKEN
        kept.drafted[slots] = 0
        kept.shown[slots] = 0
        self.extend(slots, prompts, offsets)
        return slots

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`.

        Raises:
            InputError: a slot that is not open, negative token ids, or offsets that do not fit.
        """
        slots = self._slots.checked(slots)
        tokens = checked_tokens(tokens)
        offsets = as_offsets(offsets, len(tokens), len(slots))
        chosen = self.settings
        extend_batch(
            self.table, self.counts, self._sequences,
            slots, tokens, offsets, chosen.context, chosen.fresh, chosen.text,
        )  # fmt: skip

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`: a tree a sequence, the likeliest nodes first.

        Raises:
            InputError: a slot that is not open, or not one budget a slot.
        """
        slots = self._slots.checked(slots)
        check_one_each("budget", len(budget), slots)
        chosen = self.settings
        space = len(slots) * chosen.max_tokens
        probability = np.empty(space, np.float32)
        offsets = np.empty(len(slots) + 1, np.int64)
        draft_batch(
            self.table, self.counts, self._sequences, self._candidates, self._heap,
            slots, np.asarray(budget, np.int32), chosen.context, self._floor, chosen.shape == "chain",
            probability, offsets,
        )  # fmt: skip
        used = int(offsets[-1])
        tokens = np.empty(used, np.int32)
        parents = np.empty(used, np.int32)
        copy_drafts(self._sequences, slots, offsets, tokens, parents)
        return Drafts(tokens, parents, probability[:used], np.full(used, Source.BY_PRODUCT, np.uint8), offsets)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """As `Drafter.observe`: keep the rankings until `extend` has told what was committed.

        A position whose ranking begins with -1 was not verified. A runtime that verified only a part of a tree either
        says so, or has its positions ignored but for the first: nobody knows then which nodes they are, and what was
        committed is learnt as text. A chain may have been cut at its end.

        Raises:
            InputError: a slot that is not open, no top-k, or shapes that do not fit.
        """
        slots = self._slots.checked(slots)
        if feedback.top_k is None:
            raise InputError("feedback: token_recycling needs top_k")
        ranked = np.ascontiguousarray(feedback.top_k, np.int32)
        if ranked.ndim != 2:
            raise InputError(f"feedback: expected top_k of shape (positions, k), got {ranked.shape}")
        offsets = as_offsets(feedback.offsets, len(ranked), len(slots))
        observe_batch(self._sequences, slots, ranked, offsets)

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`.

        Raises:
            InputError: a slot that is not open, or named twice.
        """
        self._slots.release(slots)


@kernel
def kind_of(length: int, longer: bool, trust: int, depth: int) -> int:
    """The kind of a row; see `KINDS`."""
    return (((length - 1) * 2 + longer) * (MAX_TRUST + 1) + trust) * (MAX_DEPTH + 1) + min(depth, MAX_DEPTH)


@kernel
def probability_of(counts: Counts, kind: int, rank: int) -> float:
    """The share of cases in which the token of a rank was the next one."""
    prior = PRIOR[min(rank, len(PRIOR) - 1)] * PRIOR_WEIGHT
    return (counts.hits[kind, rank] + prior) / (counts.trials[kind] + PRIOR_WEIGHT)


@kernel
def gather(table: Table, counts: Counts, context: Int32, length: int, owner: int, depth: int, found: Candidates) -> int:
    """Write the candidates for the token after a context, from the longest known context down; return how many.

    A token is listed once, as the longest context has it. A shorter context shares out what the longer ones leave.
    """
    used = 0
    longer = False
    left = 1.0
    for n in range(length, 0, -1):
        if context[n - 1] == NO_TOKEN:
            continue
        row = find_row(table, hash_context(context, n, owner))
        if row < 0:
            continue
        kind = kind_of(n, longer, table.rows[row, TRUST], depth)
        before = used
        taken = 0.0
        for rank in range(table.rows.shape[1] - TOKENS):
            token = table.rows[row, TOKENS + rank]
            if token == NO_TOKEN:
                break
            known = False
            for i in range(before):
                known = known or found.tokens[i] == token
            if not known:
                found.tokens[used] = token
                found.likelihood[used] = left * probability_of(counts, kind, rank)
                taken += found.likelihood[used]
                used += 1
        longer = True
        left = max(0.0, left - taken)
    return used


@kernel
def judge(table: Table, counts: Counts, context: Int32, length: int, owner: int, depth: int, token: int) -> None:
    """Count which rank `token`, which was committed after a context, had in the rows that `gather` reads."""
    longer = False
    for n in range(length, 0, -1):
        if context[n - 1] == NO_TOKEN:
            continue
        row = find_row(table, hash_context(context, n, owner))
        if row < 0:
            continue
        kind = kind_of(n, longer, table.rows[row, TRUST], depth)
        if counts.trials[kind] >= HORIZON:
            counts.trials[kind] *= 0.5
            counts.hits[kind] *= 0.5
        counts.trials[kind] += 1.0
        for rank in range(table.rows.shape[1] - TOKENS):
            if table.rows[row, TOKENS + rank] == token:
                counts.hits[kind, rank] += 1.0
                return
        longer = True


@kernel
def extend_batch(
    table: Table,
    counts: Counts,
    sequences: Sequences,
    slots: Int64,
    tokens: Int32,
    offsets: Int64,
    length: int,
    fresh: int,
    text: bool,
) -> None:
    """Judge the last draft's rows by what was committed, learn what was shown, and move on."""
    context = np.empty(MAX_CONTEXT, np.int32)
    for row in range(len(slots)):
        slot = slots[row]
        committed, owner = sequences.context[slot], sequences.owner[slot]
        shown = sequences.shown[slot]
        if shown > 0:
            context[:] = committed
            for i in range(offsets[row], offsets[row + 1]):
                judge(table, counts, context, length, owner, i - offsets[row], tokens[i])
                push_token(context, tokens[i])
            for position in range(shown):
                ranked = sequences.ranked[slot, position]
                if ranked[0] != NO_TOKEN:
                    context_at(committed, sequences.tokens[slot], sequences.parents[slot], position - 1, context)
                    learn_ranked(table, context, length, owner, ranked, fresh)
        for i in range(offsets[row], offsets[row + 1]):
            # What no ranking covers: a prompt, or nodes of a tree of which nobody knows which were verified.
            if text and i - offsets[row] >= shown:
                learn_next(table, committed, length, owner, tokens[i])
            push_token(committed, tokens[i])
        sequences.shown[slot] = 0
        sequences.drafted[slot] = 0


@kernel
def observe_batch(sequences: Sequences, slots: Int64, ranked: Int32, offsets: Int64) -> None:
    """Keep what verification showed of each sequence's last draft."""
    k = min(ranked.shape[1], sequences.ranked.shape[2])
    for row in range(len(slots)):
        slot = slots[row]
        shown = known_positions(offsets[row + 1] - offsets[row], sequences.parents[slot], sequences.drafted[slot])
        sequences.shown[slot] = shown
        sequences.ranked[slot, :shown] = NO_TOKEN
        for position in range(shown):
            for rank in range(k):
                sequences.ranked[slot, position, rank] = ranked[offsets[row] + position, rank]


@kernel
def draft_batch(
    table: Table,
    counts: Counts,
    sequences: Sequences,
    found: Candidates,
    heap: Heap,
    slots: Int64,
    budget: Int32,
    length: int,
    floor: float,
    chain: bool,
    probability: Float32,
    offsets: Int64,
) -> None:
    """Grow a tree for each sequence, or a chain, into `sequences`; fill the ragged `probability` from the left."""
    context = np.empty(MAX_CONTEXT, np.int32)
    offsets[0] = 0
    for row in range(len(slots)):
        slot = slots[row]
        tokens, parents = sequences.tokens[slot], sequences.parents[slot]
        most = min(budget[row], len(tokens))
        nodes, waiting, order = 0, 0, 0
        parent, likelihood = -1, 1.0
        while nodes < most:
            depth = context_at(sequences.context[slot], tokens, parents, parent, context)
            candidates = gather(table, counts, context, length, sequences.owner[slot], depth, found)
            if chain:
                waiting = 0
            for i in range(candidates):
                joint = likelihood * found.likelihood[i]
                if joint >= floor:
                    push(heap, waiting, joint, order, found.tokens[i], parent)
                    waiting += 1
                    order += 1
            if waiting == 0:
                break
            likelihood = heap.likelihood[0]
            tokens[nodes] = heap.node[0, TOKEN]
            parents[nodes] = heap.node[0, PARENT]
            probability[offsets[row] + nodes] = np.float32(likelihood)
            parent = nodes
            nodes += 1
            waiting -= 1
            pop(heap, waiting)
        sequences.drafted[slot] = nodes
        offsets[row + 1] = offsets[row] + nodes


@kernel
def copy_drafts(sequences: Sequences, slots: Int64, offsets: Int64, tokens: Int32, parents: Int32) -> None:
    """Copy each slot's draft to its place in the ragged arrays."""
    for row in range(len(slots)):
        for node in range(offsets[row + 1] - offsets[row]):
            tokens[offsets[row] + node] = sequences.tokens[slots[row], node]
            parents[offsets[row] + node] = sequences.parents[slots[row], node]

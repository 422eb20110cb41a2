"""Lookahead decoding: n-grams from Jacobi trajectories, found in the pass that verifies earlier ones."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import ByteSize, Field

from freedraft.plugins.adjacency import (
    NO_TOKEN,
    TOKENS,
    Table,
    find_row,
    hash_context,
    new_table,
    owners,
    stamp_row,
    take_row,
)
from freedraft.plugins.base import Drafts, Feedback, FeedbackKind, Source
from freedraft.plugins.config import DrafterSettings
from freedraft.plugins.guesses import Samples, grown_samples, guess, new_samples, note_token, start_samples
from freedraft.plugins.slots import Slots, check_one_each, checked_tokens, grown
from freedraft.plugins.verified import FOLLOWED, child_with, known_positions
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Float64, Int32, Int64, as_offsets, as_tokens

# Kinds of node, for the counts of how often they were right: of the window, then of the pool's branches by their rank.
WINDOW, POOL = 0, 1
# Before anything is counted, one guess in so many is right; and the weight of that belief.
PRIOR_HITS, PRIOR_TRIALS = 0.4, 4.0
HORIZON = 1024.0


class LookaheadSettings(DrafterSettings):
    """Settings of `lookahead`; names and letters as in the paper."""

    ngram: int = Field(4, ge=2, le=8, description="N: tokens of an n-gram, its key included.")
    window: int = Field(10, ge=1, le=64, description="W: columns of the window; it has N - 1 rows.")
    branches: int = Field(10, ge=1, le=64, description="G: n-grams kept for a key, and verified at once.")
    shape: Literal["tree", "chain"] = Field(
        "tree",
        description="Draft window and branches as one tree of (N - 1) (W + G) nodes, or only a chain for a runtime "
        "that takes no trees: the newest n-gram, then the newest row of the window.",
    )
    initial: Literal["prompt", "random"] = Field(
        "prompt", description="What a new column of the window is filled with: tokens of the prompt, or any tokens."
    )
    text: bool = Field(True, description="Take the n-grams of the prompt and of the committed text into the pool, too.")
    scope: Literal["off", "engine"] = Field(
        "engine",
        description="Whose n-grams a sequence is drafted from: `off` = those of its own text and window alone; "
        "`engine` = all in the pool, whoever's they were. By its timing a reply can then betray words of another's.",
    )
    memory: ByteSize = Field(
        ByteSize(2**26),
        ge=2**12,
        le=2**33,
        description="Bytes of the pool, which all sequences share; the system hands them out as they are used.",
    )


class Sequences(NamedTuple):
    """What is kept for each slot; R = N - 1 rows, W columns, M nodes at most, of which as many or F are verified.

    Row r, column c of the window stands c + r places behind the next token.

    Attributes:
        window: int32 `(slots, R, W)`, the oldest row first.
        age: int32 `(slots, W)`, passes since the column was filled with guesses.
        leaf: int32 `(slots, W)`, the verified node whose argmax goes on with the column; -1 = none.
        owner: int64 `(slots,)`, of the n-grams that the sequence reads and writes.
        tail: int32 `(slots, N)`, the last tokens of the text, the newest last, -1 where there are fewer.
        drafted: int32 `(slots,)`, nodes of the last draft.
        tokens, parents, kind: int32 `(slots, M)`, these.
        followed: int32 `(slots,)`, nodes of another drafter's draft, verified instead; -1 = the own one was.
        followed_tokens, followed_parents: int32 `(slots, F)`, these, the first ones.
        shown: int32 `(slots,)`, verified positions in `argmax`; 0 = no feedback.
        argmax: int32 `(slots, F + 1)`.
    """

    window: Int32
    age: Int32
    leaf: Int32
    owner: Int64
    tail: Int32
    drafted: Int32
    tokens: Int32
    parents: Int32
    kind: Int32
    followed: Int32
    followed_tokens: Int32
    followed_parents: Int32
    shown: Int32
    argmax: Int32


class Counts(NamedTuple):
    """How often a node was right where its parent was, by kind of node and depth.

    Attributes:
        hits: float64 `(POOL + G, max(W, N))`.
        trials: float64, likewise.
    """

    hits: Float64
    trials: Float64


class Lookahead:
    """Drafts n-grams that the target made up itself while it decoded, in a window of guesses.

    From Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding" (arXiv 2402.02057,
    section 3).

    A window of N - 1 rows and W columns holds the last iterates of a Jacobi iteration. In each pass the target gives
    every column its next token, the oldest row goes, and a column with the token it got is an n-gram for the pool. The
    same pass verifies the G newest n-grams that begin with the last committed token.

    The paper's mask lets a token of the window see the oldest row up to its column, and then its own column. That
    is a tree: the oldest row is its trunk, and each column hangs on the trunk. So the window needs no mask of its
    own, it is drafted. What differs from the paper: branches and window share nodes where they agree, so a token of
    the window is accepted as well where it is right; a column that the text overtakes is filled anew by itself, where
    the paper's implementation fills a row; and n-grams of the text go into the pool.
    """

    Settings: ClassVar[type[LookaheadSettings]] = LookaheadSettings
    feedback: ClassVar[frozenset[FeedbackKind]] = frozenset({"accepted", "argmax"})

    def __init__(self, settings: LookaheadSettings) -> None:
        self.settings = settings
        rows, columns, branches = settings.ngram - 1, settings.window, settings.branches
        most = rows * (columns + branches)
        followed = max(most, FOLLOWED)
        self.pool = new_table(int(settings.memory), rows * branches)
        shape = (POOL + branches, max(columns, settings.ngram))
        self.counts = Counts(np.full(shape, PRIOR_HITS), np.full(shape, PRIOR_TRIALS))
        self._opened = 0
        self._slots = Slots()
        self._samples = new_samples(0)
        self._sequences = Sequences(
            np.empty((0, rows, columns), np.int32),
            np.empty((0, columns), np.int32),
            np.empty((0, columns), np.int32),
            np.empty(0, np.int64),
            np.empty((0, settings.ngram), np.int32),
            np.empty(0, np.int32),
            np.empty((0, most), np.int32),
            np.empty((0, most), np.int32),
            np.empty((0, most), np.int32),
            np.empty(0, np.int32),
            np.empty((0, followed), np.int32),
            np.empty((0, followed), np.int32),
            np.empty(0, np.int32),
            np.empty((0, followed + 1), np.int32),
        )

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
        kept.owner[slots] = owners(self.settings.scope, self._opened, len(slots))
        self._opened += len(slots)
        kept.tail[slots] = NO_TOKEN
        # No column is filled yet: the first draft does it.
        kept.age[slots] = -1
        kept.drafted[slots] = 0
        kept.followed[slots] = -1
        kept.shown[slots] = 0
        start_samples(self._samples, slots)
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
        extend_batch(self.pool, self.counts, self._sequences, self._samples, slots, tokens, offsets, self.settings.text)

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`: window and branches as one tree a sequence.

        Where the budget is too small for both, the window gets half of it at most.

        Raises:
            InputError: a slot that is not open, or not one budget a slot.
        """
        slots = self._slots.checked(slots)
        check_one_each("budget", len(budget), slots)
        space = len(slots) * self._sequences.tokens.shape[1]
        tokens, parents = np.empty(space, np.int32), np.empty(space, np.int32)
        probability = np.empty(space, np.float32)
        offsets = np.empty(len(slots) + 1, np.int64)
        chosen = self.settings
        draft_batch(
            self.pool, self.counts, self._sequences, self._samples, slots, np.asarray(budget, np.int32),
            chosen.shape == "chain", chosen.initial == "random", tokens, parents, probability, offsets,
        )  # fmt: skip
        used = int(offsets[-1])
        source = np.full(used, Source.BY_PRODUCT, np.uint8)
        return Drafts(tokens[:used], parents[:used], probability[:used], source, offsets)

    def adopt(self, slots: Int64, drafts: Drafts) -> None:
        """As `FollowsDrafts.adopt`: columns go on where these drafts have them, and n-grams are taken from all paths.

        Raises:
            InputError: a slot that is not open, or not one draft a slot.
        """
        slots = self._slots.checked(slots)
        check_one_each("drafts", drafts.rows, slots)
        adopt_batch(self._sequences, slots, drafts.tokens, drafts.parents, drafts.offsets)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """As `Drafter.observe`: keep the argmax until `extend` has told what was committed.

        A position whose argmax is -1 was not verified. A runtime that verified only a part of a tree either says so,
        or has its positions ignored: nobody knows then which nodes they are. A chain may have been cut at its end.

        Raises:
            InputError: a slot that is not open, no argmax, or shapes that do not fit.
        """
        slots = self._slots.checked(slots)
        if feedback.argmax is None:
            raise InputError("feedback: lookahead needs argmax")
        argmax = as_tokens(feedback.argmax, "argmax")
        offsets = as_offsets(feedback.offsets, len(argmax), len(slots))
        observe_batch(self._sequences, slots, argmax, offsets)

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`.

        Raises:
            InputError: a slot that is not open, or named twice.
        """
        self._slots.release(slots)


@kernel
def remember(pool: Table, owner: int, key: int, ngram: Int32) -> None:
    """Put an n-gram, int32 `(N - 1,)` behind its key, first in the key's row of an owner's in the pool."""
    context = np.empty(1, np.int32)
    context[0] = key
    hashed = hash_context(context, 1, owner)
    row = find_row(pool, hashed)
    if row < 0:
        row = take_row(pool, hashed)
    kept = pool.rows[row, TOKENS:]
    size = len(ngram)
    places = len(kept) // size
    # The place it has now, else the last one: what lies before moves back by one.
    place = 0
    while place < places - 1:
        same = True
        for i in range(size):
            same = same and kept[place * size + i] == ngram[i]
        if same or kept[place * size] == NO_TOKEN:
            break
        place += 1
    for i in range(place * size - 1, -1, -1):
        kept[i + size] = kept[i]
    kept[:size] = ngram
    stamp_row(pool, row, 0)


@kernel
def extend_batch(
    pool: Table,
    counts: Counts,
    sequences: Sequences,
    samples: Samples,
    slots: Int64,
    tokens: Int32,
    offsets: Int64,
    text: bool,
) -> None:
    """Count how the last draft did, move the window on, and take new n-grams into the pool."""
    for row in range(len(slots)):
        slot = slots[row]
        new = tokens[offsets[row] : offsets[row + 1]]
        if len(new) == 0:
            continue
        if sequences.shown[slot] > 0:
            judge(counts, sequences, slot, new)
        move_window(pool, sequences, slot, len(new))
        if sequences.followed[slot] >= 0:
            remember_paths(pool, sequences, slot)
        tail = sequences.tail[slot]
        for token in new:
            for i in range(len(tail) - 1):
                tail[i] = tail[i + 1]
            tail[-1] = token
            note_token(samples, slot, token)
            if text and tail[0] != NO_TOKEN:
                remember(pool, sequences.owner[slot], tail[0], tail[1:])
        sequences.shown[slot] = 0
        sequences.drafted[slot] = 0
        sequences.followed[slot] = -1


@kernel
def remember_paths(pool: Table, sequences: Sequences, slot: int) -> None:
    """Take the n-grams into the pool that end with what the target predicted behind the nodes of another's draft."""
    tokens, parents = sequences.followed_tokens[slot], sequences.followed_parents[slot]
    tail = sequences.tail[slot]
    ngram = np.empty(len(tail), np.int32)
    for node in range(sequences.shown[slot] - 1):
        ngram[-1] = sequences.argmax[slot, node + 1]
        place, back = node, len(tail) - 1
        for i in range(len(tail) - 2, -1, -1):
            if place >= 0:
                ngram[i] = tokens[place]
                place = parents[place]
            else:
                ngram[i] = tail[back]
                back -= 1
        if ngram[-1] >= 0 and ngram[0] != NO_TOKEN:
            remember(pool, sequences.owner[slot], ngram[0], ngram[1:])


@kernel
def judge(counts: Counts, sequences: Sequences, slot: int, committed: Int32) -> None:
    """Count which nodes along the committed path were right."""
    tokens, parents, kind = sequences.tokens[slot], sequences.parents[slot], sequences.kind[slot]
    parent = -1
    for depth in range(min(len(committed), counts.hits.shape[1])):
        following = -2
        for node in range(parent + 1, sequences.drafted[slot]):
            if parents[node] == parent:
                at = kind[node], depth
                if counts.trials[at] >= HORIZON:
                    counts.trials[at] *= 0.5
                    counts.hits[at] *= 0.5
                counts.trials[at] += 1.0
                if tokens[node] == committed[depth]:
                    counts.hits[at] += 1.0
                    following = node
        if following < 0:
            break
        parent = following


@kernel
def move_window(pool: Table, sequences: Sequences, slot: int, committed: int) -> None:
    """Give each column its next token and the pool the n-gram; shift the window by the committed tokens.

    A column that has lost its place, or got no token, is left with age -1, to be filled anew.
    """
    window, age, leaf = sequences.window[slot], sequences.age[slot], sequences.leaf[slot]
    rows, columns = window.shape
    shown = sequences.shown[slot]
    ngram = np.empty(rows, np.int32)
    for column in range(columns):
        token = sequences.argmax[slot, leaf[column] + 1] if age[column] >= 0 and 0 <= leaf[column] < shown - 1 else -1
        if token < 0:
            age[column] = -1
            continue
        ngram[: rows - 1] = window[1:, column]
        ngram[rows - 1] = token
        # The first rows - 1 tokens that a column gets replace guesses that are nobody's.
        if age[column] >= rows - 1:
            remember(pool, sequences.owner[slot], window[0, column], ngram)
        window[:, column] = ngram
        age[column] += 1
    shift = committed - 1
    for column in range(columns):
        if column + shift < columns:
            window[:, column] = window[:, column + shift]
            age[column] = age[column + shift]
        else:
            age[column] = -1
    leaf[:] = -1


@kernel
def add_node(sequences: Sequences, slot: int, nodes: int, parent: int, token: int, kind: int, limit: int) -> int:
    """The node of `token` behind `parent`: the one there is, else a new one, number `nodes`; -1 beyond `limit`."""
    tokens, parents = sequences.tokens[slot], sequences.parents[slot]
    for node in range(parent + 1, nodes):
        if parents[node] == parent and tokens[node] == token:
            return node
    if nodes >= limit:
        return -1
    tokens[nodes] = token
    parents[nodes] = parent
    sequences.kind[slot, nodes] = kind
    return nodes


@kernel
def add_window(sequences: Sequences, slot: int, nodes: int, columns: int, limit: int) -> int:
    """Add the first `columns` columns of the window to `nodes` nodes, as a trunk and its branches; return the nodes."""
    window, leaf = sequences.window[slot], sequences.leaf[slot]
    trunk = -1
    for column in range(columns):
        trunk = add_node(sequences, slot, nodes, trunk, window[0, column], WINDOW, limit)
        nodes = max(nodes, trunk + 1)
        node = trunk
        for row in range(1, len(window)):
            node = add_node(sequences, slot, nodes, node, window[row, column], WINDOW, limit)
            nodes = max(nodes, node + 1)
        leaf[column] = node
    return nodes


@kernel
def add_branches(pool: Table, sequences: Sequences, slot: int, limit: int) -> int:
    """Draft the pool's n-grams behind the last token, the newest first; return the nodes."""
    nodes = 0
    size = sequences.window.shape[1]
    row = find_row(pool, hash_context(sequences.tail[slot, -1:], 1, sequences.owner[slot]))
    if row < 0:
        return nodes
    kept = pool.rows[row, TOKENS:]
    for rank in range(len(kept) // size):
        if kept[rank * size] == NO_TOKEN:
            break
        node = -1
        for i in range(size):
            node = add_node(sequences, slot, nodes, node, kept[rank * size + i], POOL + rank, limit)
            if node < 0:
                return nodes
            nodes = max(nodes, node + 1)
    return nodes


@kernel
def add_chain(pool: Table, sequences: Sequences, slot: int, columns: int, limit: int) -> int:
    """Draft the pool's newest n-gram, and behind it the newest row of the window; return the nodes."""
    window, leaf = sequences.window[slot], sequences.leaf[slot]
    rows = len(window)
    nodes = add_branches(pool, sequences, slot, min(rows, limit))
    # Of several n-grams only the newest: its nodes come first, each the child of the one before.
    chain = 0
    while chain < nodes and sequences.parents[slot, chain] == chain - 1:
        chain += 1
    nodes = chain
    while nodes < min(limit, columns + rows - 1):
        row = min(nodes, rows - 1)
        nodes = add_node(sequences, slot, nodes, nodes - 1, window[row, nodes - row], WINDOW, limit) + 1
    for column in range(columns):
        leaf[column] = column + rows - 1 if column + rows - 1 < nodes else -1
    return nodes


@kernel
def draft_batch(
    pool: Table,
    counts: Counts,
    sequences: Sequences,
    samples: Samples,
    slots: Int64,
    budget: Int32,
    chain: bool,
    anything: bool,
    tokens: Int32,
    parents: Int32,
    probability: Float32,
    offsets: Int64,
) -> None:
    """Write each sequence's draft; the ragged arrays are filled from the left."""
    offsets[0] = 0
    for row in range(len(slots)):
        slot = slots[row]
        window, age = sequences.window[slot], sequences.age[slot]
        rows, columns = window.shape
        limit = min(budget[row], sequences.tokens.shape[1])
        samples.started[slot] = 1
        sequences.followed[slot] = -1
        sequences.leaf[slot, :] = -1
        for column in range(columns):
            if age[column] < 0:
                age[column] = 0
                for i in range(rows):
                    window[i, column] = guess(samples, slot, rows * column + i, anything)
        if limit <= 0 or sequences.tail[slot, -1] == NO_TOKEN:
            nodes = 0
        elif chain:
            nodes = add_chain(pool, sequences, slot, columns, limit)
        else:
            if limit < sequences.tokens.shape[1]:
                columns = min(columns, limit // (2 * rows))
            nodes = add_branches(pool, sequences, slot, limit - columns * rows)
            nodes = add_window(sequences, slot, nodes, columns, limit)
        sequences.drafted[slot] = nodes
        start = offsets[row]
        depths = np.empty(nodes, np.int32)
        for node in range(nodes):
            parent = sequences.parents[slot, node]
            depths[node] = depths[parent] + 1 if parent >= 0 else 0
            at = sequences.kind[slot, node], min(depths[node], counts.hits.shape[1] - 1)
            likelihood = np.float32(counts.hits[at] / counts.trials[at])
            tokens[start + node] = sequences.tokens[slot, node]
            parents[start + node] = parent
            probability[start + node] = probability[start + parent] * likelihood if parent >= 0 else likelihood
        offsets[row + 1] = start + nodes


@kernel
def adopt_batch(sequences: Sequences, slots: Int64, tokens: Int32, parents: Int32, offsets: Int64) -> None:
    """Take down what is verified instead of the own drafts, and where in it the columns of the window end."""
    for row in range(len(slots)):
        slot, first = slots[row], offsets[row]
        nodes = min(offsets[row + 1] - first, sequences.followed_tokens.shape[1])
        sequences.followed[slot] = nodes
        known, parents_known = sequences.followed_tokens[slot], sequences.followed_parents[slot]
        known[:nodes] = tokens[first : first + nodes]
        parents_known[:nodes] = parents[first : first + nodes]
        window, leaf = sequences.window[slot], sequences.leaf[slot]
        leaf[:] = -1
        trunk = -1
        for column in range(window.shape[1]):
            trunk = child_with(known, parents_known, nodes, trunk, window[0, column])
            node = trunk
            for i in range(1, len(window)):
                if node >= 0:
                    node = child_with(known, parents_known, nodes, node, window[i, column])
            leaf[column] = max(node, -1)
            if trunk < 0:
                break


@kernel
def observe_batch(sequences: Sequences, slots: Int64, argmax: Int32, offsets: Int64) -> None:
    """Keep the argmax of the verified positions of each sequence's last draft."""
    for row in range(len(slots)):
        slot = slots[row]
        other = sequences.followed[slot] >= 0
        verified = sequences.followed[slot] if other else sequences.drafted[slot]
        parents = sequences.followed_parents[slot] if other else sequences.parents[slot]
        shown = known_positions(offsets[row + 1] - offsets[row], parents, verified)
        sequences.shown[slot] = shown
        for i in range(shown):
            sequences.argmax[slot, i] = argmax[offsets[row] + i]

"""Online suffix automata: for each of many growing texts, what followed its longest suffixes before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from freedraft.retrieval.contexts import contexts_batch, continuations_batch
from freedraft.retrieval.errors import CapacityError, InputError
from freedraft.retrieval.growth import (
    BAD_SLOT,
    BAD_TOKEN,
    CHAIN_CAP,
    HEAD_LEARNING,
    HEAD_LENGTH,
    HEAD_MATCH_LENGTH,
    HEAD_NEXT_SLOT,
    HEAD_OPEN,
    HEAD_TEXT,
    close_batch,
    extend_batch,
    open_batch,
)
from freedraft.retrieval.memory import PAGE_BYTES, PAGE_WORDS, POOL_FREE_SLOT, POOL_TOTAL, POOL_USED, new_pool
from freedraft.retrieval.ragged import Int32, Int64, as_offsets, as_slots, as_tokens

MIB = 2**20
MAX_MEMORY = 8 * 2**30
FIRST_SLOTS = 16
MOST_CONTINUATIONS = 2**16


class Arrays(NamedTuple):
    """What a kernel needs to read the automata; see `memory` and `growth` for the layout.

    Attributes:
        words: int32 `(pages * PAGE_WORDS,)`, the arena.
        sequences: int32 `(slots, fields)`, a header a sequence.
    """

    words: Int32
    sequences: Int32


@dataclass(frozen=True, slots=True)
class Contexts:
    """The contexts of n texts: the suffixes that occurred before, longest first, along the suffix links.

    All arrays are int32 `(n, depth)`; rows are filled from the left, and a `length` of -1 marks the places left over.
    The last context of a text is the empty one, `length` 0, unless `depth` cuts it off.

    Attributes:
        length: tokens.
        count: earlier occurrences.
        position: index in the text of the last token of the most recent of them.
        first: likewise, of the first of them.
        likeliest: the token that followed most often; of equals the most recent.
        times: how often it followed.
        recent: the token that followed last.
        state: names the context to `SuffixAutomata.continuations`; valid until the next `extend` or `close`.
    """

    length: Int32
    count: Int32
    position: Int32
    first: Int32
    likeliest: Int32
    times: Int32
    recent: Int32
    state: Int32


class SuffixAutomata:
    """Suffix automata of many texts, grown a token at a time, in one arena of bounded memory.

    Appending costs O(1) amortised a token, opening and closing O(pages). A text's structure is exact for any ids from 0
    to 2**31 - 1. Its counts are exact while no more than `CHAIN_CAP` contexts of different occurrences nest, which
    ordinary text never reaches; beyond, the counts of the shortest are too low.

    When the arena is full, or a text reaches `max_length`, that text **stops learning**: what was learnt stays, later
    tokens only move the match along, and nothing is lost to other texts. Closing sequences makes room for new ones.

    A text takes whole pages of 16 KiB, two of them as soon as it has a token. No more texts may be open than the arena
    has pages. Each also has a header outside the arena, of 80 bytes and 4 for every 4096 tokens of `max_length`.

    Args:
        memory: bytes that the arena may take, at most 8 GiB; the system gives them page by page as they are used.
        max_length: tokens that one text may learn.

    Raises:
        InputError: a bound out of range.
    """

    def __init__(self, *, memory: int = 1024 * MIB, max_length: int = 2**20) -> None:
        pages = memory // PAGE_BYTES
        if not pages >= 4 or memory > MAX_MEMORY:
            raise InputError(f"memory: expected {4 * PAGE_BYTES} to {MAX_MEMORY} bytes, got {memory}")
        if not 1 <= max_length <= 2**23:
            raise InputError(f"max_length: expected 1 to {2**23} tokens, got {max_length}")
        self._words: Int32 = np.empty(pages * PAGE_WORDS, np.int32)
        self._words[:PAGE_WORDS] = 0
        self._next_page: Int32 = np.zeros(pages, np.int32)
        self._pool = new_pool(pages, max_length)
        self._fields = HEAD_TEXT + -(-max_length // PAGE_WORDS)
        self._sequences: Int32 = np.zeros((0, self._fields), np.int32)
        self._open = 0

    def open(self, prompts: Any, offsets: Any) -> Int64:
        """Start a text for each row of the ragged batch `prompts` (int32 ids); return its slots, int64 `(n,)`.

        Raises:
            InputError: a bad ragged batch, or an id below 0 or beyond int32. Nothing is opened then.
            CapacityError: more texts than the arena has pages. Nothing is opened then.
        """
        prompts = as_tokens(prompts, "prompts")
        offsets = as_offsets(offsets, len(prompts))
        count = len(offsets) - 1
        most = len(self._next_page)
        if self._open + count > most:
            raise CapacityError(
                f"open: {self._open} texts are open, and {count} more make more than {most}, one a page of `memory`"
            )
        if self._open + count > len(self._sequences):
            self._add_slots(min(most, max(FIRST_SLOTS, 2 * len(self._sequences), self._open + count)))
        slots = np.empty(count, np.int64)
        open_batch(self._words, self._pool, self._next_page, self._sequences, slots)
        self._open += count
        if len(prompts):
            try:
                self.extend(slots, prompts, offsets)
            except InputError:
                self.close(slots)
                raise
        return slots

    def extend(self, slots: Any, tokens: Any, offsets: Any) -> None:
        """Append the ragged batch `tokens` (int32 ids) to the texts in `slots`, int64 `(n,)`, distinct.

        A long prompt may come in any number of pieces.

        Raises:
            InputError: a bad ragged batch, an id below 0 or beyond int32, or a slot that is not open. Nothing is
                appended then.
        """
        slots = as_slots(slots)
        tokens = as_tokens(tokens)
        offsets = as_offsets(offsets, len(tokens), len(slots))
        status = extend_batch(self._words, self._pool, self._next_page, self._sequences, slots, tokens, offsets)
        if status == BAD_SLOT:
            raise InputError(f"slots: expected open ones, got {slots}")
        if status == BAD_TOKEN:
            raise InputError(f"tokens: token ids must not be negative, got {int(tokens.min())}")

    def close(self, slots: Any) -> None:
        """End the texts in `slots`, int64 `(n,)`; their pages are free for others.

        Raises:
            InputError: a slot that is not open, or twice the same. Nothing is closed then.
        """
        slots = as_slots(slots)
        if close_batch(self._pool, self._next_page, self._sequences, slots) == BAD_SLOT:
            raise InputError(f"slots: expected open and distinct ones, got {slots}")
        self._open -= len(slots)

    def contexts(self, slots: Any, depth: int = 8) -> Contexts:
        """The longest `depth` contexts of each text in `slots`, int64 `(n,)`. O(depth) a text.

        Raises:
            InputError: a slot that is not open, or a depth out of 1 to `CHAIN_CAP`.
        """
        if not 1 <= depth <= CHAIN_CAP:
            raise InputError(f"depth: expected 1 to {CHAIN_CAP}, got {depth}")
        slots = self._check(slots)
        result = Contexts(*(np.full((len(slots), depth), -1, np.int32) for _ in range(8)))
        contexts_batch(
            self._words, self._sequences, slots, result.length, result.count, result.position, result.first,
            result.likeliest, result.times, result.recent, result.state,
        )  # fmt: skip
        return result

    def continuations(self, slots: Any, states: Any, limit: int = 64) -> tuple[Int32, Int32, Int64]:
        """What followed a context of each text, and how often.

        Args:
            slots: int64 `(n,)`.
            states: int32 `(n,)`, one of the `Contexts.state` of each text, as of now; any other gives nonsense.
            limit: at most this many a text, 1 to 65536.

        Returns:
            Ragged tokens int32, counts int32 and their offsets int64 `(n + 1,)`, most frequent first (of equals the
            smaller id first). A context with more than 16 x `limit` continuations is looked through up to there.

        Raises:
            InputError: a slot that is not open, or a state out of the arena.
        """
        slots = self._check(slots)
        states = as_tokens(states, "states")
        if len(states) != len(slots) or (len(states) and not 0 < states.min() <= states.max() < len(self._words) // 8):
            raise InputError(f"states: expected one for each of {len(slots)} slots, as given by contexts()")
        if not 1 <= limit <= MOST_CONTINUATIONS:
            raise InputError(f"limit: expected 1 to {MOST_CONTINUATIONS}, got {limit}")
        return continuations_batch(self._words, self._sequences, slots, states, limit)

    def lengths(self, slots: Any) -> Int32:
        """Tokens learnt by each text, int32 `(n,)`."""
        return self._sequences[self._check(slots), HEAD_LENGTH]

    def match_lengths(self, slots: Any) -> Int32:
        """The length of each text's longest suffix that occurred before, int32 `(n,)`."""
        return self._sequences[self._check(slots), HEAD_MATCH_LENGTH]

    def learning(self, slots: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Bool `(n,)`: False where a text has stopped learning."""
        return self._sequences[self._check(slots), HEAD_LEARNING] != 0

    @property
    def memory_used(self) -> int:
        """Bytes of the arena that open texts hold."""
        return int(self._pool[POOL_USED]) * PAGE_BYTES

    @property
    def memory_total(self) -> int:
        """Bytes of the arena."""
        return int(self._pool[POOL_TOTAL]) * PAGE_BYTES

    @property
    def arrays(self) -> Arrays:
        """The arrays for a kernel that reads the automata; valid until the next `open`."""
        return Arrays(self._words, self._sequences)

    def _check(self, slots: Any) -> Int64:
        slots = as_slots(slots)
        if len(slots) and not 0 <= slots.min() <= slots.max() < len(self._sequences):
            raise InputError(f"slots: expected open ones, got {slots}")
        if not (self._sequences[slots, HEAD_OPEN] == 1).all():
            raise InputError(f"slots: expected open ones, got {slots}")
        return slots

    def _add_slots(self, count: int) -> None:
        old = len(self._sequences)
        grown = np.zeros((count, self._fields), np.int32)
        grown[:old] = self._sequences
        grown[old:, HEAD_NEXT_SLOT] = np.arange(old + 1, count + 1)
        grown[-1, HEAD_NEXT_SLOT] = self._pool[POOL_FREE_SLOT]
        self._pool[POOL_FREE_SLOT] = old
        self._sequences = grown

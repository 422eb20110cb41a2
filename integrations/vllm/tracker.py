"""The sequence tracker: which sequence each row of vLLM's batch is, from the tokens alone.

vLLM shows a proposer rows of tokens and no names. Rows move: a request finishes and the last row takes its place,
requests are preempted and resumed, two rows are swapped, calls are skipped. So a sequence is known by its content:
**an entry is valid for a row exactly when its text is a prefix of the row**, and then the rest of the row is what the
drafter lacks. Nothing else, no request id and no row number, is part of what an entry means; the row where it was
in the last call only tells where to look first.

For each row, in every step:

    look at the entry that this row held in the last call:
        its length and the new tokens make up the row, and head and tail (16 tokens each) are in place: same sequence
        ... unless something is suspicious: then read the row and compare the fingerprint of the whole text
    else search the entries that are in no other row, and read the row to be sure
    else it is a new sequence

Suspicious are: a length that does not add up (calls were skipped, another sequence moved in); another entry with equal
length, head and tail but another text (replies to the same prompt that diverged and met again); a young sequence, whose
tail is still the prompt's (prompts cut from one template). Apart from that, rows are read whole in turn, those longest
unread first, as many as hold `routine_tokens` and one at least in a step; with no more in the batch, that is every
row in every step.

What can still collide: a sequence leaves its row, and before the next call another one takes it that is not known by
the text it had before the step (never seen, forgotten since, or grown in calls that were skipped or put off), with the
same length, the same first 16 tokens and the same last 16, but with a difference in the middle, in a batch of which not
all could be read. The last 16 were then written by the model for the first one, unless the step's reading (`most_read`)
was spent before it came to the young ones. Its entry then holds the other's middle until its turn to be read comes, as
many steps later as there are rows at most where `most_read` leaves room for one, when it is found out and built anew.
Besides, two different texts share a 64-bit fingerprint with a probability of about 2**-64.
Both are harmless: the text is only where drafts come from, and vLLM verifies each of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from freedraft.integrations.vllm.matching import match_rows
from freedraft.integrations.vllm.table import (
    POSTPONED,
    UNKNOWN,
    Batch,
    Bounds,
    Table,
    advance,
    catch_up,
    evict_idle,
    lengths_fit,
)
from freedraft.retrieval.borrowing import borrowed
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.lending import Lent
from freedraft.retrieval.ragged import Bool, Int32, Int64

MOST_READ = 1 << 20
"""Tokens that the checks of one step may read, and again that new texts may bring: well below 1 ms each."""


class Known(NamedTuple):
    """What the tracker knows from one step to the next.

    Attributes:
        table: the known sequences.
        before: int64 `(rows,)`, the entry that each row held in the last call, `UNKNOWN` = none.
        bounds: what a step may do.
    """

    table: Table
    before: Int64
    bounds: Bounds


class Step(NamedTuple):
    """What one step brought. Sequences are small numbers; carry it out in this order: close, open, extend.

    Attributes:
        closed: int64, sequences that ended: forgotten for want of room, or taken for another that they are not.
        opened: int64, new sequences, with no text yet; a number in `closed` may be among them.
        growing: int64 `(n,)`, sequences to extend,
        offsets: int64 `(n + 1,)`,
        tokens: int32, the j-th of them by `tokens[offsets[j]:offsets[j + 1]]`.
        sequences: int64 `(rows,)`, the sequence in each row; -1 = none: nothing to draft from.
        ready: bool `(rows,)`, whether the sequence has the whole text of its row.
        previous: int64 `(rows,)`, tokens of the row when it was last seen; 0 when it is new.
    """

    closed: Int64
    opened: Int64
    growing: Int64
    offsets: Int64
    tokens: Int32
    sequences: Int64
    ready: NDArray[np.bool_]
    previous: Int64


class SequenceTracker:
    """Finds the sequence in each row and hands out what its drafter lacks.

    Cost of a step: two cache lines of each row, the new tokens, and `routine_tokens`.
    """

    def __init__(
        self,
        rows: int,
        *,
        step_tokens: int = 8192,
        idle_sequences: int = 64,
        idle_tokens: int = 1 << 18,
        idle_steps: int = 8,
        routine_tokens: int = 1 << 17,
        most_read: int = MOST_READ,
    ) -> None:
        """Make room for `rows` rows.

        Args:
            rows: the most rows that a step will have.
            step_tokens: hand out at most this many tokens a step; a long prompt takes several.
            idle_sequences: keep at most this many sequences that are in no row: preempted, or ended.
            idle_tokens: likewise, at most this many tokens of them.
            idle_steps: forget a sequence that was in no row for more steps than this.
            routine_tokens: rows that nothing is suspicious about, to be read whole in each step.
            most_read: see `MOST_READ`.
        """
        for name, value, least in (
            ("rows", rows, 1),
            ("step_tokens", step_tokens, 1),
            ("idle_sequences", idle_sequences, 0),
            ("idle_tokens", idle_tokens, 0),
            ("idle_steps", idle_steps, 0),
            ("routine_tokens", routine_tokens, 0),
            ("most_read", most_read, 1),
        ):
            if value < least:
                raise InputError(f"{name}: expected at least {least}, got {value}")
        self.rows = rows
        self.capacity = rows + idle_sequences
        bounds = Bounds(step_tokens, idle_sequences, idle_tokens, idle_steps, routine_tokens, most_read)
        self._table = Table(*np.zeros((5, self.capacity), np.int64), *np.zeros((4, self.capacity), np.uint64))
        self._known = lend(Known(self._table, np.full(rows, UNKNOWN, np.int64), bounds))
        self._clock = 0

    def step(self, length: NDArray[Any], new: Int64, tokens: NDArray[Any]) -> Step:
        """Take in one step of the batch.

        Args:
            length: int32 `(rows or more,)`, tokens in each row, this step's included.
            new: int64 `(rows,)`, tokens that this step added to each.
            tokens: int32 `(rows or more, width)`; only read.

        Raises:
            InputError: more rows than room, arrays of another type, or a length beyond the width.
        """
        count = len(new)
        if count > self.rows:
            raise InputError(f"expected at most {self.rows} rows, got {count}")
        if tokens.dtype != np.int32 or tokens.ndim != 2 or len(tokens) < count:
            raise InputError(f"tokens: expected int32 ({count} or more, width), got {tokens.dtype} {tokens.shape}")
        if length.dtype != np.int32 or length.ndim != 1 or len(length) < count:
            raise InputError(f"length: expected int32 ({count} or more,), got {length.dtype} {length.shape}")
        if not lengths_fit(length, count, tokens.shape[1]):
            raise InputError(f"length: expected 0 to {tokens.shape[1]}, got {length[:count]}")
        self._clock += 1
        return Step(*track(self._known, length, new, tokens, self._clock))

    def forget(self, sequences: Int64) -> None:
        """End these sequences; a row that holds one of them is a new sequence in the next step."""
        self._table.length[sequences] = 0

    @property
    def known(self) -> Int64:
        """The sequences known, those in no row included; int64."""
        return np.flatnonzero(self._table.length)


@kernel
def lend(known: Known) -> Lent[Known]:
    """Lend the arrays to `track`."""
    return Lent(known)


@kernel
def track(
    known: Lent[Known], length: Int32, new: Int64, tokens: Int32, step: int
) -> tuple[Int64, Int64, Int64, Int64, Int32, Int64, Bool, Int64]:
    """Take in one step of the batch; returns the fields of `Step` in their order.

    Args:
        known: is brought up to date.
        length, new, tokens: the rows, see `Batch`.
        step: number of this step, above all before.
    """
    table, before, bounds = borrowed(known.arrays)
    batch = borrowed(Batch(length, new, tokens))
    rows = batch.new.shape[0]
    owner = match_rows(table, batch, before, step, bounds.routine_tokens, bounds.most_read)
    settled = True
    for i in range(rows):
        settled &= owner[i] != POSTPONED
    previous, closed, opened = advance(table, batch, owner, step, bounds.most_read)
    # A row whose reading was put off may yet turn out to hold one of the sequences that seem to be idle.
    if settled:
        closed = np.concatenate((closed, evict_idle(table, step, bounds)))
    growing, offsets, tokens = catch_up(table, batch, owner, bounds.step_tokens)
    ready = np.zeros(rows, np.bool_)
    for i in range(rows):
        ready[i] = owner[i] >= 0 and table.taken[owner[i]] == batch.length[i]
    before[:] = UNKNOWN
    before[:rows] = owner
    return closed, opened, growing, offsets, tokens, owner, ready, previous

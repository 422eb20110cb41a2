"""The vocabulary that drafters and runtimes share: `Drafter`, `Drafts`, `Feedback`, and what some drafters add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from freedraft.plugins.config import DrafterSettings
from freedraft.retrieval.ragged import Float32, Int32, Int64, UInt8

FeedbackKind = Literal["accepted", "argmax", "top_k"]
"""What a drafter can ask to be told after verification."""


class Source(IntEnum):
    """Where a drafted token comes from: `Drafts.source`."""

    OTHER = 0
    OWN_TEXT = 1
    RESPONSES = 2
    CORPUS = 3
    REFERENCE = 4
    BY_PRODUCT = 5


@dataclass(slots=True, eq=False)
class Drafts:
    """Draft tokens for a batch of n sequences, t tokens in all; row i is `offsets[i]:offsets[i + 1]`.

    A row is a tree whose nodes are listed parents first. A chain is the tree with one branch, its parents being
    -1, 0, 1, 2, ...

    Attributes:
        tokens: int32 `(t,)`.
        parents: int32 `(t,)`, the index **within the row** of the node that a token follows; -1 = it follows the
            committed text.
        probability: float32 `(t,)`, the estimated probability that the token is accepted together with all its
            ancestors; never rises along a path.
        source: uint8 `(t,)`, a `Source`.
        offsets: int64 `(n + 1,)`.
    """

    tokens: Int32
    parents: Int32
    probability: Float32
    source: UInt8
    offsets: Int64

    @property
    def rows(self) -> int:
        """The number of sequences."""
        return len(self.offsets) - 1

    def row(self, i: int) -> slice:
        """The slice of row i in `tokens`, `parents`, `probability` and `source`."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    @staticmethod
    def empty(rows: int) -> Drafts:
        """No draft for any of `rows` sequences."""
        return Drafts(
            np.empty(0, np.int32),
            np.empty(0, np.int32),
            np.empty(0, np.float32),
            np.empty(0, np.uint8),
            np.zeros(rows + 1, np.int64),
        )

    @staticmethod
    def joined(parts: Sequence[Drafts]) -> Drafts:
        """The rows of all `parts`, one or more, in order."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Drafts(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.parents for part in parts]),
            np.concatenate([part.probability for part in parts]),
            np.concatenate([part.source for part in parts]),
            offsets,
        )


@dataclass(frozen=True, slots=True)
class Feedback:
    """What verification showed, for a batch of n sequences.

    A verified position is one whose next-token logits the target computed: entry 0 of a row is the last committed
    token before the draft, entry 1 + j is node j of what `draft` returned. Of a draft that was cut, the nodes that were
    not verified have -1 for argmax and top-k; a chain's may be left off at the end instead. Row i's positions are
    `offsets[i]:offsets[i + 1]`.

    Attributes:
        accepted: int32 `(n,)`, accepted draft tokens a row.
        offsets: int64 `(n + 1,)` over the verified positions.
        argmax: int32 `(positions,)`, the target's likeliest next token; None unless a drafter asked for it.
        top_k: int32 `(positions, k)`, the target's k likeliest next tokens, likeliest first; None likewise.
    """

    accepted: Int32
    offsets: Int64
    argmax: Int32 | None = None
    top_k: Int32 | None = None


@runtime_checkable
class Drafter(Protocol):
    """Drafts tokens for many sequences at once; the target model then verifies them.

    A sequence's state is a pure function of its committed tokens (and of caches that sequences share), so a runtime
    may close a slot and open it again with the same text at any time. A drafter decides nothing about the output:
    a wrong draft costs time, never text. Every method works on a whole batch; slots in one call are distinct.
    """

    Settings: ClassVar[type[DrafterSettings]]
    """The pydantic model of its settings; the registry calls `cls(Settings(...))`."""

    @property
    def feedback(self) -> frozenset[FeedbackKind]:
        """The feedback it needs; a runtime collects no more than this and skips `observe` when it is empty."""
        ...

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """Start a sequence for each row of the ragged batch `prompts`; rows may be empty.

        Returns:
            int64 `(n,)` slots, valid until closed.
        """
        ...

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """Append committed tokens, ragged int32, to the sequences in `slots` int64 `(n,)`.

        Called with many tokens while a prompt is taken in piecewise, then once a step.
        """
        ...

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """Propose what follows the committed text of each slot; never waits for the model.

        Args:
            slots: int64 `(n,)`.
            budget: int32 `(n,)`, at most this many draft tokens a row; 0 = none.
        """
        ...

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """Learn from the verification of the last `draft`; called before the `extend` that commits its outcome."""
        ...

    def close(self, slots: Int64) -> None:
        """End the sequences; their memory is reused."""
        ...


@runtime_checkable
class TakesReference(Protocol):
    """A drafter that can also use a text that comes with a request: one that the reply is expected to resemble."""

    def refer(self, slots: Int64, texts: Int32, offsets: Int64) -> None:
        """Give sequences that have had no draft yet such a text each, ragged int32; an empty one is none."""
        ...


@runtime_checkable
class FollowsDrafts(Protocol):
    """A drafter that learns as well from the verification of drafts that others made: so it can serve `fusion`."""

    def adopt(self, slots: Int64, drafts: Drafts) -> None:
        """`drafts` are verified, not those of the last `draft`: the next `observe` is about their nodes."""
        ...


@runtime_checkable
class KeepsReplies(Protocol):
    """A drafter for which replies are more than the text of their own sequence: a source for others, say."""

    def end_reply(self, slots: Int64) -> None:
        """The replies in these sequences are complete: what is appended next is the user's, until the next draft."""
        ...

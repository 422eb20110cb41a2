"""Documents: what an index is built from, as tokens and names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.format import BORDER, DIGEST_BYTES
from freedraft.retrieval.ragged import Int32, Int64, UInt8, as_offsets, as_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """n documents, a ragged batch.

    Attributes:
        tokens: int32 `(t,)`, from 0 up.
        offsets: int64 `(n + 1,)`.
        names: n of them; several documents may have the same.

    Raises:
        InputError: a bad ragged batch, a negative id, or not one name a document.
    """

    tokens: Int32
    offsets: Int64
    names: Sequence[str]

    def __post_init__(self) -> None:
        tokens = as_tokens(self.tokens)
        if len(tokens) and tokens.min() < 0:
            raise InputError(f"tokens: token ids must not be negative, got {int(tokens.min())}")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "offsets", as_offsets(self.offsets, len(tokens), len(self.names)))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, Int32]]:
        for i, name in enumerate(self.names):
            yield name, self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @staticmethod
    def of(pairs: Iterable[tuple[str, Int32]]) -> Documents:
        """From names and tokens."""
        names, rows = [], []
        for name, tokens in pairs:
            names.append(name)
            rows.append(tokens)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return Documents(np.concatenate(rows) if rows else np.empty(0, np.int32), offsets, names)

    @staticmethod
    def of_text(text: Int32, starts: Int64, names: Sequence[str]) -> Documents:
        """The inverse of `text`."""
        keep = np.ones(len(text), bool)
        keep[starts[1:] - 1] = False
        return Documents(text[keep], starts - np.arange(len(starts)), names)

    def text(self) -> tuple[Int32, Int64]:
        """All documents in one text, a `BORDER` after each, int32 `(t + n,)`, and their starts in it, `(n + 1,)`."""
        starts = self.offsets + np.arange(len(self.offsets))
        text = np.empty(len(self.tokens) + len(self), np.int32)
        keep = np.ones(len(text), bool)
        keep[starts[1:] - 1] = False
        text[keep] = self.tokens
        text[~keep] = BORDER
        return text, starts

    def without(self, dropped: NDArray[np.bool_]) -> Documents:
        """The documents where `dropped`, bool `(n,)`, is False."""
        if not dropped.any():
            return self
        return Documents.of(pair for pair, drop in zip(self, dropped, strict=True) if not drop)

    def digests(self) -> UInt8:
        """A digest of each document's tokens, uint8 `(n, DIGEST_BYTES)`: equal documents have equal ones."""
        return np.frombuffer(b"".join(document_digest(tokens) for _, tokens in self), np.uint8).reshape(
            len(self), DIGEST_BYTES
        )


def document_digest(tokens: Int32) -> bytes:
    """BLAKE2b-128 of the little-endian tokens."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").tobytes(), digest_size=DIGEST_BYTES).digest()


def concatenate(parts: Sequence[Documents]) -> Documents:
    """All documents of all parts, in order."""
    tokens = np.concatenate([part.tokens for part in parts]) if parts else np.empty(0, np.int32)
    lengths = np.concatenate([np.diff(part.offsets) for part in parts]) if parts else np.empty(0, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Documents(tokens, offsets, [name for part in parts for name in part.names])

"""From raw documents to what segments are built of: tokenised, without duplicates, in portions of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from freedraft.retrieval.build.sources import RawDocument
from freedraft.retrieval.build.texts import cut
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.index.documents import Documents, document_digest
from freedraft.retrieval.ragged import Int32

BATCH_CHARACTERS = 1 << 20
"""Texts go to the tokenizer in batches of about this size: enough for all its threads."""


@dataclass(slots=True)
class Progress:
    """How far a build is.

    Attributes:
        bytes_read: of the sources, as they are on disk.
        total_bytes: of all sources; None = not known.
        documents: tokenised and kept.
        duplicates: left out.
        tokens: of the kept documents.
        segments: begun.
        finishing: everything is read, the last segments are being built.
    """

    bytes_read: int = 0
    total_bytes: int | None = None
    documents: int = 0
    duplicates: int = 0
    tokens: int = 0
    segments: int = 0
    finishing: bool = False


def tokenised(documents: Iterable[RawDocument], tokenizer: Tokenizer) -> Iterator[tuple[str, Int32]]:
    """Names and tokens, in order; a long text becomes several documents of one name, an empty one none."""
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        content = document.content
        for part in cut(content) if isinstance(content, str) else [content]:
            batch.append(RawDocument(document.name, part))
            size += len(part)
            if size >= BATCH_CHARACTERS:
                yield from _encoded(batch, tokenizer)
                batch, size = [], 0
    yield from _encoded(batch, tokenizer)


def pieces(documents: Iterable[tuple[str, Int32]], segment_tokens: int) -> Iterator[tuple[str, Int32]]:
    """Cut documents that would not fit into a segment with their border, into several of one name."""
    for name, tokens in documents:
        for start in range(0, len(tokens), segment_tokens - 1):
            yield name, tokens[start : start + segment_tokens - 1]


def distinct(
    documents: Iterable[tuple[str, Int32]], seen: set[bytes], progress: Progress
) -> Iterator[tuple[str, Int32]]:
    """Leave out documents whose digest is in `seen`, and add the others' to it: about 80 bytes a document.

    What comes here must be cut as it will be stored, or a later build would not know it again.
    """
    for name, tokens in documents:
        digest = document_digest(tokens)
        if digest in seen:
            progress.duplicates += 1
        else:
            seen.add(digest)
            yield name, tokens


def portions(
    documents: Iterable[tuple[str, Int32]], segment_tokens: int, progress: Progress, report: Callable[[], None]
) -> Iterator[Documents]:
    """Pack documents, in order, each no longer than `pieces` leaves it, into portions of at most `segment_tokens`
    tokens and borders."""
    portion = _Portion(segment_tokens)
    for name, tokens in documents:
        progress.documents += 1
        progress.tokens += len(tokens)
        report()
        if not portion.add(name, tokens):
            progress.segments += 1
            yield portion.documents()
            portion = _Portion(segment_tokens)
            portion.add(name, tokens)
    if portion.names:
        progress.segments += 1
        yield portion.documents()


class _Portion:
    """Documents that are being collected; the memory for their tokens is only used as far as it is filled."""

    def __init__(self, segment_tokens: int) -> None:
        self._tokens = np.empty(segment_tokens, np.int32)
        self._ends = [0]
        self.names: list[str] = []

    def add(self, name: str, tokens: Int32) -> bool:
        """Take a document if there is room for it and its border."""
        start = self._ends[-1]
        end = start + len(tokens)
        if end + len(self._ends) > len(self._tokens):
            return False
        self._tokens[start:end] = tokens
        self._ends.append(end)
        self.names.append(name)
        return True

    def documents(self) -> Documents:
        """What was collected."""
        return Documents(self._tokens[: self._ends[-1]], np.array(self._ends), self.names)


def _encoded(batch: list[RawDocument], tokenizer: Tokenizer) -> Iterator[tuple[str, Int32]]:
    texts = [document.content for document in batch if isinstance(document.content, str)]
    encoded = iter(tokenizer.encode(texts) if texts else [])
    for document in batch:
        tokens = next(encoded) if isinstance(document.content, str) else document.content
        if len(tokens):
            yield document.name, tokens

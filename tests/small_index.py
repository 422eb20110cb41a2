"""Indexes of a few documents, for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.manifest import Manifest, TokenizerEntry
from freedraft.retrieval.index.store import IndexWriter, write_segment


def create(folder: Path, *segments: Sequence[Sequence[int]], fingerprint: str = "00" * 16) -> str:
    """Write an index with these segments' documents, named d0, d1 and so on, and return its path."""
    with IndexWriter(folder, create=True) as writer:
        entries = []
        for rows in segments:
            documents = Documents.of((f"d{i}", np.array(row, np.int32)) for i, row in enumerate(rows))
            entries.append(write_segment(writer.new_segment_path(), documents))
        tokenizer = TokenizerEntry(f"tokenizer of {folder.name}", fingerprint, 100)
        writer.commit(Manifest(tokenizer, segments=tuple(entries)))
    return str(folder)

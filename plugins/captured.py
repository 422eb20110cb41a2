"""An index of captured replies: one that is appended to all the time, and stays below a size.

It is an index like any other, but for who may change it: one that holds anything else is left alone. Segments stay in
the order of their age, the oldest first, and the oldest go when there is no more room. All files are readable by their
owner alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import numpy as np

from freedraft.retrieval.errors import ConfigError
from freedraft.retrieval.index.documents import Documents, concatenate
from freedraft.retrieval.index.errors import LockedError, NotFoundError, TokenizerMismatchError
from freedraft.retrieval.index.lock import LOCK
from freedraft.retrieval.index.manifest import Manifest, SegmentEntry, TokenizerEntry, read_manifest
from freedraft.retrieval.index.segment import Segment
from freedraft.retrieval.index.store import MOST_SEGMENTS, UNFINISHED, CorpusIndex, IndexWriter, write_segment

SOURCE = "capture"
"""What the manifest says of where the documents come from; what `freedraft index build` says there begins with a /."""

SHARE = 4
"""Segments are merged up to this part of the size: so much goes at once, and is built at once."""

BYTES_A_TOKEN = 64
"""Of a segment, an upper estimate for replies of some ten tokens or more."""

PREPARING_SECONDS = 10.0
TRY_AGAIN_SECONDS = 0.05


def prepare(folder: Path, tokenizer: TokenizerEntry) -> None:
    """See that there is an index of captured replies in `folder`, an empty one if need be.

    Raises:
        ConfigError: there is an index that was not made here.
        TokenizerMismatchError: it has the replies of a model with another tokenizer.
        LockedError: others have written there for long, and there is no index yet; or the file system has no locks.
        CorpusIndexError, OSError: it is damaged, or cannot be made.
    """
    end = monotonic() + PREPARING_SECONDS
    while True:
        try:
            _check(read_manifest(folder), folder, tokenizer)
            return
        except NotFoundError:
            pass
        try:
            with _writer(folder) as writer:
                try:
                    read_manifest(folder)
                except NotFoundError:
                    _commit(writer, Manifest(tokenizer, dedup=True, sources=(SOURCE,)))
        except LockedError as error:
            # Another worker that starts now makes it.
            if not is_busy(error) or monotonic() > end:
                raise
            sleep(TRY_AGAIN_SECONDS)


def append(
    folder: Path, tokenizer: TokenizerEntry, documents: Documents, max_size: int, in_haste: bool = False
) -> None:
    """Add replies, but for those that are there already.

    When there are too many segments, the newest are written anew together with the replies, as one.

    Args:
        max_size: bytes of all segments, which is more than a segment of `documents` takes.
        in_haste: write no more than the newest segment anew.

    Raises:
        LockedError: another process, or thread, writes there; see `is_busy`.
        ConfigError, TokenizerMismatchError, CorpusIndexError, OSError: see `prepare`; nothing was changed then.
    """
    with _writer(folder) as writer:
        try:
            index = CorpusIndex(folder)
        except NotFoundError:
            # Somebody has removed it.
            _commit(writer, Manifest(tokenizer, dedup=True, sources=(SOURCE,)))
            index = CorpusIndex(folder)
        manifest = index.manifest
        _check(manifest, folder, tokenizer)
        documents = _not_there(documents, index.segments)
        if not len(documents):
            return
        kept = len(manifest.segments)
        if kept >= MOST_SEGMENTS:
            first = _first_of_newest(manifest.segments, BYTES_A_TOKEN * len(documents.tokens), max_size // SHARE)
            kept = max(first, kept - 1) if in_haste else first
        newest = concatenate([*(segment.documents() for segment in index.segments[kept:]), documents])
        path = writer.new_segment_path()
        _create_private(path)
        entries = [*manifest.segments[:kept], write_segment(path, newest, manifest.min_count)]
        while sum(entry.size for entry in entries) > max_size:
            del entries[0]
        _commit(writer, replace(manifest, segments=tuple(entries)))


def is_busy(error: LockedError) -> bool:
    """Whether it is worth to try again: there are locks, and somebody has this one."""
    return isinstance(error.__cause__, BlockingIOError)


def _check(manifest: Manifest, folder: Path, tokenizer: TokenizerEntry) -> None:
    if set(manifest.sources) != {SOURCE}:
        raise ConfigError(
            f"capture: {folder}: expected a folder for captured replies alone, which the oldest leave when it is full; "
            f"this index also has documents from {', '.join(manifest.sources[:3]) or 'elsewhere'}; name another, and "
            "both of them in `index`"
        )
    if manifest.tokenizer.fingerprint != tokenizer.fingerprint:
        raise TokenizerMismatchError(
            f"capture: {folder}: has replies in the tokens of {manifest.tokenizer.name}, while {tokenizer.name} has "
            "another vocabulary or other merges; name another folder"
        )


def _not_there(documents: Documents, segments: Sequence[Segment]) -> Documents:
    """The distinct documents that no segment has."""
    digests = documents.digests()
    seen: set[bytes] = set()
    for segment in segments:
        # Half a digest tells nearly all apart.
        halves = segment.digests.view("<u8")[:, 0]
        maybe = np.isin(halves, digests.view("<u8")[:, 0])
        seen.update(digest.tobytes() for digest in segment.digests[maybe])
    known = np.zeros(len(documents), np.bool_)
    for i, digest in enumerate(digests):
        known[i] = digest.tobytes() in seen
        seen.add(digest.tobytes())
    return documents.without(known)


def _first_of_newest(entries: Sequence[SegmentEntry], size: int, share: int) -> int:
    """Where the newest segments begin that take no more than `share` bytes together with `size` bytes of new ones."""
    first = len(entries)
    while first > 0 and size + entries[first - 1].size <= share:
        first -= 1
        size += entries[first].size
    return first


@contextmanager
def _writer(folder: Path) -> Iterator[IndexWriter]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with IndexWriter(folder, create=True) as writer:
        yield writer


def _commit(writer: IndexWriter, manifest: Manifest) -> None:
    _create_private(writer.folder / UNFINISHED)
    writer.commit(manifest)


def _create_private(path: Path) -> None:
    """Make an empty file that only its owner may read: who writes into it keeps its mode."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

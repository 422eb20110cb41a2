"""An index as a folder: opened for reading, and written by one process at a time so that it is always whole.

A segment's file never changes. What an index consists of is said by its manifest alone, which is replaced in one step
when everything that it names is on disk. A file that no manifest names is of a writer that was killed: the next one
removes it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.documents import Documents, concatenate
from freedraft.retrieval.index.errors import ManifestError, NotFoundError
from freedraft.retrieval.index.format import digest
from freedraft.retrieval.index.lock import WriterLock
from freedraft.retrieval.index.manifest import MANIFEST, SEGMENT_NAME, Manifest, SegmentEntry, read_manifest
from freedraft.retrieval.index.reporting import Report, ReportTokens, in_turn, nobody, part
from freedraft.retrieval.index.segment import Segment, segment_bytes
from freedraft.retrieval.ragged import Int64

UNFINISHED = MANIFEST + ".new"
MOST_SEGMENTS = 8
MERGED_AT_ONCE = 6
MAX_TOKENS = 2**30
OPENING_TRIES = 5


class CorpusIndex:
    """An index, opened for reading: in milliseconds, whatever its size.

    It goes on answering as it was opened when a writer changes it; open it again to see the change.

    Attributes:
        manifest: what it consists of.
        segments: in the manifest's order.

    Raises:
        NotFoundError: no index in the folder.
        CorpusIndexError: the manifest or a segment is damaged, see `read_manifest` and `Segment`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        for attempt in range(OPENING_TRIES):
            self.manifest = read_manifest(folder)
            try:
                self.segments = [_open_segment(self.folder, entry) for entry in self.manifest.segments]
            except NotFoundError as error:
                # A writer may have put a new manifest in place, and removed old segments, since we read it.
                if attempt + 1 < OPENING_TRIES and read_manifest(folder) != self.manifest:
                    continue
                raise ManifestError(f"{self.folder / MANIFEST}: names a segment that is not there: {error}") from error
            return

    def verify(self, report: ReportTokens | None = None) -> None:
        """Check all checksums and the whole structure of every segment; reads all of it.

        Args:
            report: called often, with the tokens that are checked.

        Raises:
            ChecksumError, DamagedError: the first thing wrong.
        """
        reports = in_turn([segment.tokens for segment in self.segments], report)
        for segment, progress in zip(self.segments, reports, strict=True):
            segment.verify(self.manifest.tokenizer.vocabulary_size, progress)


class IndexWriter:
    """The one process that may change the index in `folder`; a context manager.

        with IndexWriter(folder) as writer:
            entry = write_segment(writer.new_segment_path(), documents)
            writer.commit(manifest)

    What is not committed when it ends, by an exception or a kill, was never there.

    Args:
        folder: of the index.
        create: make the folder if it is not there; there need not be an index in it.

    Raises:
        NotFoundError: no index there, without `create`.
        InputError: with `create`, there is a file where the folder is to be.
        LockedError: another process writes it.
        VersionError: a newer freedraft wrote it; its files are left alone.
    """

    def __init__(self, folder: str | os.PathLike[str], create: bool = False) -> None:
        self.folder = Path(folder)
        self._create = create
        self._made_folder = False

    def __enter__(self) -> IndexWriter:
        if self._create:
            self._made_folder = not self.folder.exists()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise InputError(f"{self.folder}: a file is in the way; an index is a folder") from error
        elif not (self.folder / MANIFEST).is_file():
            raise NotFoundError(f"{self.folder}: no index there (it would have a {MANIFEST})")
        self._lock = WriterLock(self.folder)
        try:
            self._remove_strays()
        except BaseException:
            # `__exit__` will not be called.
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        nothing_came_of_it = self._made_folder and not (self.folder / MANIFEST).exists()
        try:
            self._remove_strays()
        finally:
            self._lock.release(remove=nothing_came_of_it)
        if nothing_came_of_it:
            with suppress(OSError):
                self.folder.rmdir()

    def new_segment_path(self) -> Path:
        """A new name for a segment's file, in the folder; any process may write it."""
        return self.folder / f"{secrets.token_hex(8)}.segment"

    def commit(self, manifest: Manifest) -> None:
        """Make the index what `manifest` says, in one step; its segments' files are complete and on disk.

        Raises:
            ManifestError: a segment's file is not what the manifest says.
        """
        for entry in manifest.segments:
            _open_segment(self.folder, entry)
        path = self.folder / UNFINISHED
        with open(path, "w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        # The segments' names must be on disk before a manifest that has them, and that before old files go.
        _fsync_folder(self.folder)
        path.replace(self.folder / MANIFEST)
        _fsync_folder(self.folder)
        self._remove_strays()

    def _remove_strays(self) -> None:
        try:
            named = {entry.file for entry in read_manifest(self.folder).segments}
        except NotFoundError:
            named = set()
        except ManifestError:
            # Nobody knows what is a stray; `build --replace` will.
            return
        for path in self.folder.iterdir():
            if path.name == UNFINISHED or (SEGMENT_NAME.fullmatch(path.name) and path.name not in named):
                path.unlink(missing_ok=True)


def write_segment(
    path: str | os.PathLike[str], documents: Documents, min_count: int = 1, report: Report = nobody
) -> SegmentEntry:
    """Build a segment of `documents` and write its file, to disk; return its entry for the manifest.

    Args:
        report: called with the share of the time that this is likely to take.

    Raises:
        MissingPackageError, SectionError: see `segment_bytes`.
    """
    pieces = segment_bytes(documents, min_count, part(report, 0.0, 0.9))
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece.data)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    report(1.0)
    return SegmentEntry(Path(path).name, size, len(documents), len(documents.tokens), digest(pieces[0]).hex())


def delete_documents(
    folder: str | os.PathLike[str],
    names: Collection[str],
    max_tokens: int = MAX_TOKENS,
    report: ReportTokens | None = None,
) -> int:
    """Delete the documents of these names; return how many there were.

    The segments that hold them are written anew without them, so that they are gone from answers and from disk at
    once; costs the building of those segments.

    Args:
        max_tokens: of a new segment, borders included: a larger one becomes several. A document is never cut.
        report: called often, with the tokens that are written anew.

    Raises:
        NotFoundError, LockedError, CorpusIndexError: see `IndexWriter` and `CorpusIndex`.
    """
    wanted = set(names)
    deleted = 0
    with IndexWriter(folder) as writer:
        index = CorpusIndex(folder)
        manifest = index.manifest
        # In order: entries to keep, and the documents that make a new segment.
        plan: list[SegmentEntry | tuple[Segment, Int64]] = []
        for segment, entry in zip(index.segments, manifest.segments, strict=True):
            kept = np.flatnonzero([name not in wanted for name in segment.names()])
            if len(kept) == len(segment):
                plan.append(entry)
                continue
            deleted += len(segment) - len(kept)
            plan += [(segment, numbers) for numbers in _portions(segment, kept, max_tokens)]
        if deleted:
            reports = in_turn([_tokens(*one) for one in plan if isinstance(one, tuple)], report)
            entries: list[SegmentEntry] = []
            for one in plan:
                if isinstance(one, tuple):
                    segment, numbers = one
                    documents = segment.some_documents(numbers)
                    path = writer.new_segment_path()
                    entries.append(write_segment(path, documents, manifest.min_count, next(reports)))
                else:
                    entries.append(one)
            writer.commit(replace(manifest, segments=tuple(entries)))
    return deleted


def _portions(segment: Segment, documents: Int64, max_tokens: int) -> list[Int64]:
    """The numbers of documents in runs of at most `max_tokens` tokens and borders; a longer document is a run."""
    if not len(documents):
        return []
    bounds, size = [], 0
    for i, length in enumerate(np.diff(segment.starts)[documents].tolist()):
        if i and size + length > max_tokens:
            bounds.append(i)
            size = 0
        size += length
    return np.split(documents, bounds)


def _tokens(segment: Segment, documents: Int64) -> int:
    return int(np.diff(segment.starts)[documents].sum())


def merge_segments(
    folder: str | os.PathLike[str], max_tokens: int = MAX_TOKENS, report: ReportTokens | None = None
) -> None:
    """Merge all segments into as few as possible, of at most `max_tokens` tokens each where they are not larger now.

    Args:
        report: called often, with the tokens that are written anew.

    Raises:
        NotFoundError, LockedError, CorpusIndexError: see `IndexWriter` and `CorpusIndex`.
    """
    with IndexWriter(folder) as writer:
        _merge(writer, lambda entries: entries, max_tokens, report)


def compact(writer: IndexWriter, max_tokens: int = MAX_TOKENS) -> None:
    """Merge the smallest segments, when there are so many that following a text through all of them costs too much.

    Only the `MERGED_AT_ONCE` smallest are merged, so that a token is rewritten O(log) times as an index grows.

    Raises:
        CorpusIndexError: see `CorpusIndex`.
    """
    if len(read_manifest(writer.folder).segments) > MOST_SEGMENTS:
        _merge(writer, lambda entries: sorted(entries, key=lambda entry: entry.tokens)[:MERGED_AT_ONCE], max_tokens)


def _merge(
    writer: IndexWriter,
    choose: Callable[[Sequence[SegmentEntry]], Sequence[SegmentEntry]],
    max_tokens: int,
    report: ReportTokens | None = None,
) -> None:
    index = CorpusIndex(writer.folder)
    manifest = index.manifest
    segments = dict(zip((entry.file for entry in manifest.segments), index.segments, strict=True))
    chosen = set(choose(manifest.segments))
    groups: list[list[SegmentEntry]] = []
    group: list[SegmentEntry] = []
    for entry in manifest.segments:
        if entry not in chosen:
            groups.append([entry])
            continue
        if group and sum(one.tokens for one in group) + entry.tokens > max_tokens:
            groups.append(group)
            group = []
        group.append(entry)
    groups.append(group)
    reports = in_turn([sum(one.tokens for one in group) for group in groups if len(group) > 1], report)
    entries: list[SegmentEntry] = []
    for group in groups:
        if len(group) > 1:
            documents = concatenate([segments[entry.file].documents() for entry in group])
            entries.append(write_segment(writer.new_segment_path(), documents, manifest.min_count, next(reports)))
        else:
            entries += group
    if len(entries) != len(manifest.segments):
        writer.commit(replace(manifest, segments=tuple(entries)))


def _open_segment(folder: Path, entry: SegmentEntry) -> Segment:
    segment = Segment(folder / entry.file)
    # Of the header as parsed: a writer may have unlinked the file by now.
    header = digest(segment.header.pack()).hex()
    found = SegmentEntry(entry.file, segment.header.file_size, len(segment), segment.tokens, header)
    if found != entry:
        raise ManifestError(f"{folder / MANIFEST}: says {entry}, the file is {found}")
    return segment


def _fsync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

"""Build an index, or add to one: sources in, an index folder out, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

from freedraft.retrieval.build.executors import Execute, Task, in_processes, in_this_process, on_ray
from freedraft.retrieval.build.limits import segment_tokens
from freedraft.retrieval.build.packing import Progress, distinct, pieces, portions, tokenised
from freedraft.retrieval.build.problems import Problems
from freedraft.retrieval.build.sources import SourceOptions, Sources
from freedraft.retrieval.build.streams import STANDARD_INPUT
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.errors import CorpusIndexError, NotFoundError, SourceError, TokenizerMismatchError
from freedraft.retrieval.index.files import open_regular
from freedraft.retrieval.index.fingerprint import tokenizer_fingerprint
from freedraft.retrieval.index.manifest import FORMAT, MANIFEST, MAX_BYTES, Manifest, SegmentEntry, TokenizerEntry
from freedraft.retrieval.index.store import CorpusIndex, IndexWriter, compact

DEFAULT_MEMORY = 4 << 30


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build.

    Attributes:
        max_memory: bytes for all processes together; with `ray`, for each task.
        workers: processes that build segments, 1 = this one; with `ray`, tasks at a time, None = its CPUs.
        ray: address of a Ray cluster.
        strict: a problem in the sources stops the build.
    """

    max_memory: int = DEFAULT_MEMORY
    workers: int | None = None
    ray: str | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was done.

    Attributes:
        documents, tokens: added.
        duplicates: documents left out because they were there already.
        segments: written; a merge may have followed.
        seconds: it took.
        problems: what was skipped.
        merge_failure: why the merge that should have followed did not; the documents are added all the same.
    """

    documents: int
    tokens: int
    duplicates: int
    segments: int
    seconds: float
    problems: Problems = field(repr=False)
    merge_failure: str | None = None


def build_index(
    folder: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    source_options: SourceOptions | None = None,
    options: BuildOptions | None = None,
    *,
    min_count: int = 1,
    dedup: bool = False,
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> BuildReport:
    """Build the index `folder` from the sources `paths`.

    An older index stays as it is until the new one is complete, whatever happens before.

    Args:
        min_count: keep only continuations seen this often in a segment.
        dedup: leave out documents whose tokens were there already.
        overwrite: there may be an index; it is replaced.
        report: called often, with how far it is.

    Raises:
        SourceError: a path is not there; nothing in the sources to index; with `strict`, the first problem.
        InputError: too little memory, no cluster, or an index is there already.
        LockedError: another process writes it.
        CapacityError: a worker died.
        MissingPackageError: a package of the `index` extra is not installed.
    """
    if index_exists(folder) and not overwrite:
        raise InputError(f"{folder}: there is an index already: append adds to it, build --replace builds it anew")
    entry = TokenizerEntry(tokenizer.name, tokenizer_fingerprint(tokenizer.path), tokenizer.vocabulary_size)
    read_as = source_options or SourceOptions()
    empty = Manifest(tokenizer=entry, min_count=min_count, dedup=dedup, reading=read_as.recorded())
    build = _Build(folder, paths, tokenizer, read_as, options or BuildOptions(), report)
    with IndexWriter(folder, create=True) as writer:
        entries = build.write(writer, empty, set())
        if not entries:
            raise SourceError(f"{_listed(paths)}: nothing to index{build.reason()}")
        writer.commit(replace(empty, sources=build.source_names(), segments=tuple(entries)))
    return build.result()


def append_to_index(
    folder: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: str | os.PathLike[str] | None = None,
    source_options: SourceOptions | None = None,
    options: BuildOptions | None = None,
    *,
    report: Callable[[Progress], None] | None = None,
) -> BuildReport:
    """Add the documents of `paths` to the index `folder`, and merge segments when there are too many.

    A merge that fails, for want of room perhaps, leaves the documents added, and is tried again by the next append.

    Args:
        tokenizer: where the index's tokenizer is; None = where it was at the build.
        report: called often, with how far it is.

    Raises:
        TokenizerMismatchError: another tokenizer than the index's.
        CorpusIndexError: no index there, or a damaged one; the rest as `build_index`.
    """
    with IndexWriter(folder, create=False) as writer:
        index = CorpusIndex(folder)
        manifest = index.manifest
        build = _Build(
            folder,
            paths,
            tokenizer_of_index(manifest, tokenizer),
            source_options or SourceOptions(),
            options or BuildOptions(),
            report,
        )
        seen: set[bytes] = set()
        if manifest.dedup:
            seen.update(digest.tobytes() for segment in index.segments for digest in segment.digests)
        entries = build.write(writer, manifest, seen)
        if not entries and not build.progress.duplicates:
            raise SourceError(f"{_listed(paths)}: nothing to index{build.reason()}")
        if entries:
            writer.commit(
                replace(
                    manifest,
                    sources=(*manifest.sources, *build.source_names()),
                    segments=(*manifest.segments, *entries),
                )
            )
            try:
                compact(writer, segment_tokens((options or BuildOptions()).max_memory, 0))
            except (OSError, MemoryError, CorpusIndexError) as error:
                return replace(build.result(), merge_failure=f"{type(error).__name__}: {error}")
    return build.result()


def tokenizer_of_index(manifest: Manifest, source: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer that an index was built with: from `source`, or from where it was then.

    Raises:
        TokenizerMismatchError: it is another one.
        SourceError: it cannot be found; the message says how to give it.
    """
    wanted = manifest.tokenizer
    try:
        tokenizer = Tokenizer(wanted.name if source is None else source)
    except SourceError as error:
        if source is None:
            raise SourceError(
                f"the index's tokenizer, {wanted.name}, cannot be read there any more: give --tokenizer ({error})"
            ) from error
        raise
    if tokenizer_fingerprint(tokenizer.path) != wanted.fingerprint:
        raise TokenizerMismatchError(
            f"the index was built with the tokenizer {wanted.name} ({wanted.vocabulary_size} tokens), "
            f"and {tokenizer.name} ({tokenizer.vocabulary_size} tokens) has another vocabulary or other merges"
        )
    return tokenizer


class _Build:
    """One run over the sources."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        paths: Sequence[str | os.PathLike[str]],
        tokenizer: Tokenizer,
        source_options: SourceOptions,
        options: BuildOptions,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self.progress = Progress()
        self._started = monotonic()
        self._problems = Problems(options.strict)
        self._options = options
        self._tokenizer = tokenizer
        self._report = report
        self._sources = Sources(
            paths,
            source_options,
            self._problems,
            tokenizer.vocabulary_size,
            tokenizer.chat_template,
            self._bytes_read,
            folder,
        )

    def write(self, writer: IndexWriter, manifest: Manifest, seen: set[bytes]) -> list[SegmentEntry]:
        """Write the segments; `seen` are the digests of the documents that the index has."""
        self.progress.total_bytes = self._sources.total_bytes()
        workers = self._options.workers or 1
        if self._options.ray is not None:
            # On a cluster the memory is a task's, and this process only hands documents over.
            limit = segment_tokens(self._options.max_memory, 1, self.progress.total_bytes)
            execute: Execute = on_ray(self._options.ray, self._options.workers, limit)
        elif workers == 1:
            limit = segment_tokens(self._options.max_memory, 0)
            execute = in_this_process
        else:
            limit = segment_tokens(self._options.max_memory, workers, self.progress.total_bytes)
            execute = in_processes(workers)
        documents = pieces(tokenised(self._sources, self._tokenizer), limit)
        if manifest.dedup:
            documents = distinct(documents, seen, self.progress)
        tasks = self._tasks(writer, portions(documents, limit, self.progress, self._changed))
        with closing(execute(tasks, manifest.min_count)) as entries:
            return list(entries)

    def source_names(self) -> tuple[str, ...]:
        """What the manifest says of where the documents come from."""
        return tuple("stdin" if path == STANDARD_INPUT else os.path.abspath(path) for path in self._sources.paths)

    def reason(self) -> str:
        """Why nothing was found, as far as problems tell."""
        return "".join(f"; {line}" for line in self._problems.lines())

    def result(self) -> BuildReport:
        """What was done until now."""
        progress = self.progress
        return BuildReport(
            progress.documents,
            progress.tokens,
            progress.duplicates,
            progress.segments,
            monotonic() - self._started,
            self._problems,
        )

    def _tasks(self, writer: IndexWriter, packed: Iterable[Documents]) -> Iterator[Task]:
        for documents in packed:
            yield writer.new_segment_path(), documents
        self.progress.finishing = True
        self._changed()

    def _bytes_read(self, number: int) -> None:
        self.progress.bytes_read += number
        self._changed()

    def _changed(self) -> None:
        if self._report is not None:
            self._report(self.progress)


def index_exists(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds an index, sound or not.

    Raises:
        InputError: it has another program's manifest.json.
    """
    try:
        CorpusIndex(folder)
    except NotFoundError:
        return False
    except CorpusIndexError:
        if _is_anothers_manifest(Path(folder, MANIFEST)):
            raise InputError(f"{folder}: its {MANIFEST} is not an index's; choose another folder") from None
    return True


def _is_anothers_manifest(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            values = json.loads(file.read(MAX_BYTES))
    except (CorpusIndexError, OSError, ValueError, RecursionError):
        return False
    return not isinstance(values, dict) or values.get("format") != FORMAT


def _listed(paths: Sequence[str | os.PathLike[str]]) -> str:
    shown = [os.fspath(path) for path in paths[:3]]
    return ", ".join(shown) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")

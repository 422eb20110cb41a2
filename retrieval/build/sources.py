"""Sources: the files, folders and streams that an index is built from, as a stream of documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np

from freedraft.retrieval.build.chat import ChatPart, ChatTemplate, as_messages, replies
from freedraft.retrieval.build.folders import FolderWalk
from freedraft.retrieval.build.problems import ProblemKind, Problems
from freedraft.retrieval.build.records import json_lines, parquet_rows
from freedraft.retrieval.build.streams import (
    STANDARD_INPUT,
    ReportBytes,
    open_stream,
    stream_errors,
    without_compression,
)
from freedraft.retrieval.build.texts import looks_binary, read_text
from freedraft.retrieval.build.token_files import read_tokens
from freedraft.retrieval.index.errors import SourceError
from freedraft.retrieval.index.manifest import Reading
from freedraft.retrieval.ragged import Int32


class Format(StrEnum):
    """What a file holds."""

    AUTO = "auto"
    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    NPY = "npy"


SUFFIXES = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".parquet": Format.PARQUET,
    ".npy": Format.NPY,
}


class RawDocument(NamedTuple):
    """A document before it is tokenised: its name, and its text or, if it came as such, its tokens."""

    name: str
    content: str | Int32


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How to read the sources.

    Attributes:
        format: of every file; AUTO goes by the name.
        field: of JSON lines and Parquet files: a name, or names and list positions joined by dots.
        chat: of a field that holds messages: "replies" = each reply of the assistant is a document, "all" = the whole
            chat as the chat template renders it is one.
        include, exclude: patterns for the files in folders, as in a `.gitignore`.
    """

    format: Format = Format.AUTO
    field: str = "text"
    chat: ChatPart = "replies"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def recorded(self) -> Reading:
        """These options as a manifest has them."""
        return Reading(str(self.format), self.field, self.chat, tuple(self.include), tuple(self.exclude))


class Sources:
    """Reads documents from paths, "-" being standard input.

    What cannot be used is one of the `problems`, and skipped; memory is bounded whatever the files' sizes.

    Args:
        paths: files and folders; a folder stands for the files in it that git would not ignore.
        vocabulary_size: token ids in `.npy` files must be below it.
        chat_template: called once, when the first chat is to be rendered.
        report: called with each number of bytes read.
        index: folder of the index that is written, which is no source of itself.

    Raises:
        SourceError: a path that does not exist, the index's own folder, or a bad pattern.
        MissingPackageError: a package of the `index` extra is needed and not installed.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        options: SourceOptions,
        problems: Problems,
        vocabulary_size: int,
        chat_template: Callable[[], ChatTemplate],
        report: ReportBytes | None = None,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.options = options
        self.problems = problems
        self._vocabulary_size = vocabulary_size
        self._load_template = chat_template
        self._template: ChatTemplate | None = None
        self._report = report
        if not self.paths:
            raise SourceError("no sources: give files, folders, or - for standard input")
        for path in self.paths:
            if path != STANDARD_INPUT and not os.path.exists(path):
                raise SourceError(f"{path}: no such file or folder")
            if index is not None and os.path.realpath(path) == os.path.realpath(index):
                raise SourceError(f"{path}: the index itself, which is no source")
        folders = any(os.path.isdir(path) for path in self.paths)
        self._walk = FolderWalk(options.include, options.exclude, index) if folders else None

    def total_bytes(self) -> int | None:
        """The size of all files, as they are on disk; None if standard input is one of them."""
        if STANDARD_INPUT in self.paths:
            return None
        return sum(size for _, size in self._files(Problems()))

    def __iter__(self) -> Iterator[RawDocument]:
        for path, _ in self._files(self.problems):
            for name, content in self._documents_of(path):
                # Bytes that are not UTF-8 stay apart from others: \\xff.
                yield RawDocument(os.fsencode(name).decode("utf-8", "backslashreplace"), content)

    def _files(self, problems: Problems) -> Iterator[tuple[str, int]]:
        for path in self.paths:
            if path == STANDARD_INPUT:
                yield path, 0
            elif self._walk is not None and os.path.isdir(path):
                yield from self._walk.files(path, problems)
            else:
                yield path, _size(path)

    def _documents_of(self, path: str) -> Iterator[RawDocument]:
        place = "stdin" if path == STANDARD_INPUT else path
        form = self.options.format
        if form is Format.AUTO:
            form = SUFFIXES.get(os.path.splitext(without_compression(path))[1].lower(), Format.TEXT)
        if form is Format.PARQUET:
            if path == STANDARD_INPUT:
                raise SourceError("stdin: Parquet cannot be read from standard input: give a file")
            for name, value in parquet_rows(path, place, self.options.field, self.problems, self._report):
                yield from self._contents(name, value)
            return
        try:
            with closing(open_stream(path, self._report)) as stream:
                yield from self._read(form, stream, place)
        except SourceError:
            raise
        except FileNotFoundError:
            self.problems.add(ProblemKind.UNREADABLE, place, "it has gone")
        except PermissionError:
            self.problems.add(ProblemKind.UNREADABLE, place, "permission denied")
        except stream_errors() as error:
            self.problems.add(ProblemKind.DAMAGED, place, f"{error}; what comes before was used")

    def _read(self, form: Format, stream: IO[bytes], place: str) -> Iterator[RawDocument]:
        if form is Format.JSONL:
            for name, value in json_lines(stream, place, self.options.field, self.problems):
                yield from self._contents(name, value)
        elif form is Format.NPY:
            try:
                for tokens in read_tokens(stream, self._vocabulary_size):
                    yield RawDocument(place, tokens)
            # numpy reads a header as Python's grammar does.
            except (ValueError, SyntaxError, TokenError) as error:
                self.problems.add(ProblemKind.DAMAGED, place, f"not usable token ids: {error}")
        elif looks_binary(stream.peek() if hasattr(stream, "peek") else b""):
            self.problems.add(ProblemKind.BINARY, place, "has zero bytes, so it is not text")
        else:
            for text in read_text(stream, place, self.problems):
                yield RawDocument(place, text)

    def _contents(self, name: str, value: Any) -> Iterator[RawDocument]:
        """The documents of a record: a text, a chat, or token ids."""
        try:
            if isinstance(value, str):
                contents: list[str | Int32] = [value]
            elif isinstance(value, list) and value and all(type(item) is int for item in value):
                contents = [self._checked_ids(value)]
            elif isinstance(value, list):
                contents = list(self._chat(value))
            else:
                raise ValueError(f"expected text, messages or token ids, got {type(value).__name__}")
            for content in contents:
                if isinstance(content, str):
                    content.encode("utf-8")
        except SourceError:
            raise
        except ValueError as error:
            self.problems.add(ProblemKind.WRONG_VALUE, name, f"field {self.options.field!r}: {error}")
            return
        for content in contents:
            if len(content):
                yield RawDocument(name, content)

    def _chat(self, value: list[Any]) -> Iterator[str]:
        messages = as_messages(value)
        if self.options.chat == "replies":
            yield from replies(messages)
        elif messages:
            if self._template is None:
                self._template = self._load_template()
            yield self._template.render(messages)

    def _checked_ids(self, values: list[int]) -> Int32:
        low, high = min(values), max(values)
        if low < 0 or high >= self._vocabulary_size:
            raise ValueError(f"token id {low if low < 0 else high} is not one of 0..{self._vocabulary_size - 1}")
        return np.array(values, np.int32)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        # Reading it will say so.
        return 0

"""A segment on disk: written once, then only mapped and read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.construct import compact_suffix_automaton
from freedraft.retrieval.index.documents import Documents, document_digest
from freedraft.retrieval.index.errors import ChecksumError, DamagedError, NotFoundError, SectionError
from freedraft.retrieval.index.files import open_regular
from freedraft.retrieval.index.follow import (
    AT_OPEN,
    BAD_SLOT,
    BAD_TOKEN,
    CURSOR_FIELDS,
    DAMAGED,
    Automaton,
    advance_batch,
    contexts_batch,
)
from freedraft.retrieval.index.format import (
    DTYPES,
    HEADER_BYTES,
    Header,
    Place,
    Section,
    digest,
    layout,
    parse_header,
)
from freedraft.retrieval.index.reporting import Report, nobody, part
from freedraft.retrieval.index.validate import FINDINGS, validate_structure
from freedraft.retrieval.ragged import MAX_TOKEN, Int32, Int64, UInt8


@dataclass(frozen=True, slots=True)
class Contexts:
    """Contexts of n texts in a segment, longest first.

    All arrays are int32 `(n, depth)`; rows are filled from the left, and a `length` of -1 marks the places left over.
    The suffixes between one length and the next shorter one occur exactly where the longer one does. The empty context
    is not among them.

    Attributes:
        length: tokens.
        count: occurrences with a token after them.
        likeliest: the token that followed most often, of equals the smallest.
        times: how often it followed.
    """

    length: Int32
    count: Int32
    likeliest: Int32
    times: Int32


class Segment:
    """A segment, mapped read-only: all processes that open it share its pages.

    Opening reads the header and the table of documents, not the automaton, whatever its size; what a query then
    follows is checked as it goes (`follow`). `verify` checks everything.

    Args:
        path: of the file.

    Raises:
        NotFoundError: no such file.
        NotAFileError: a link, a folder, a pipe or a device.
        CorpusIndexError: one of its subclasses, see `format.parse_header`.
        DamagedError: the table of documents is not in order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        name = self.path.name
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(HEADER_BYTES)
                self.header: Header = parse_header(head, size, name)
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: no such segment") from error
        self._bytes: UInt8 = np.frombuffer(mapped, np.uint8)
        self.automaton = Automaton(self._array(Section.TEXT), self._array(Section.NODES), self._array(Section.EDGES))
        self.starts: Int64 = self._array(Section.STARTS)
        self.digests: UInt8 = self._array(Section.DIGESTS)
        self._name_offsets: Int64 = self._array(Section.NAME_OFFSETS)
        self._names: UInt8 = self._array(Section.NAMES)
        # Neighbours are compared: their differences can wrap.
        for what, offsets, end, falls in (
            ("starts", self.starts, self.header.text, np.less_equal),
            ("names", self._name_offsets, len(self._names), np.less),
        ):
            if offsets[0] != 0 or offsets[-1] != end or falls(offsets[1:], offsets[:-1]).any():
                raise DamagedError(f"{name}: the documents' {what} do not rise from 0 to {end}")

    def __len__(self) -> int:
        return self.header.documents

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return self.header.tokens

    def name(self, document: int) -> str:
        """The name of a document."""
        start, end = self._name_offsets[document : document + 2]
        return self._names[start:end].tobytes().decode("utf-8", "replace")

    def names(self) -> list[str]:
        """The names of all documents."""
        blob = self._names.tobytes()
        bounds = self._name_offsets.tolist()
        return [blob[a:b].decode("utf-8", "replace") for a, b in pairwise(bounds)]

    def documents(self) -> Documents:
        """All documents, copied out of the mapping.

        Raises:
            DamagedError: the text is not what the table of documents says.
        """
        try:
            return Documents.of_text(np.array(self.automaton.text), np.array(self.starts), self.names())
        except InputError as error:
            raise DamagedError(f"{self.path.name}: {FINDINGS[2]}") from error

    def some_documents(self, numbers: Int64) -> Documents:
        """The documents of these numbers, int64 `(n,)`, copied out of the mapping; no others are.

        Raises:
            DamagedError: as `documents`.
        """
        text, starts = self.automaton.text, self.starts
        try:
            return Documents.of((self.name(i), text[starts[i] : starts[i + 1] - 1]) for i in numbers.tolist())
        except InputError as error:
            raise DamagedError(f"{self.path.name}: {FINDINGS[2]}") from error

    def new_cursors(self, slots: int) -> Int32:
        """Cursors for `slots` texts, all open and empty, int32 `(slots, CURSOR_FIELDS)`."""
        cursors = np.zeros((slots, CURSOR_FIELDS), np.int32)
        cursors[:, AT_OPEN] = 1
        return cursors

    def advance(self, cursors: Int32, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """Move cursors by the ragged batch `tokens`; O(1) amortised a token.

        Raises:
            InputError: a slot that is not open, or a negative token. Nothing is moved then.
            DamagedError: the segment is damaged. The cursors concerned have forgotten their text.
        """
        status = advance_batch(self.automaton, cursors, slots, tokens, offsets)
        if status == BAD_SLOT:
            raise InputError(f"slots: expected open ones, got {slots}")
        if status == BAD_TOKEN:
            raise InputError(f"tokens: token ids must not be negative, got {int(tokens.min())}")
        if status == DAMAGED:
            raise self.damaged()

    def contexts(self, cursors: Int32, slots: Int64, depth: int = 8) -> Contexts:
        """The longest contexts of each text, at most `depth`.

        Raises:
            DamagedError: the segment is damaged.
        """
        result = Contexts(*(np.full((len(slots), depth), -1, np.int32) for _ in range(4)))
        if (
            contexts_batch(self.automaton, cursors, slots, result.length, result.count, result.likeliest, result.times)
            == DAMAGED
        ):
            raise self.damaged()
        return result

    def damaged(self) -> DamagedError:
        """The error for a kernel's `DAMAGED`."""
        return DamagedError(
            f"{self.path.name}: a link, an edge or a position is out of range; "
            "`freedraft index verify` tells which, build the index anew"
        )

    def verify(self, vocabulary_size: int = MAX_TOKEN + 1, report: Report = nobody) -> None:
        """Check all checksums and the whole structure; reads the whole file.

        Args:
            vocabulary_size: token ids must be below it.
            report: called with the share of the time that this is likely to take.

        Raises:
            ChecksumError: of the first section whose bytes changed.
            DamagedError: the first thing wrong in a segment whose checksums are right.
        """
        read = 0
        for section, place in self.header.sections.items():
            if digest(self._bytes[place.offset : place.offset + place.size]) != place.digest:
                raise ChecksumError(f"{self.path.name}: the checksum of section {section.name} is wrong")
            read += place.size
            report(0.1 * read / self.header.file_size)
        finding, where = validate_structure(self.automaton, self.starts, self.header.min_count, part(report, 0.1, 0.95))
        if finding:
            raise DamagedError(f"{self.path.name}: {FINDINGS[finding]} (at {where})")
        highest = int(self.automaton.text.max(initial=-1))
        if highest >= vocabulary_size:
            raise DamagedError(f"{self.path.name}: token id {highest} is not one of 0..{vocabulary_size - 1}")
        for document, (start, end) in enumerate(pairwise(self.starts.tolist())):
            if document_digest(self.automaton.text[start : end - 1]) != self.digests[document].tobytes():
                raise DamagedError(f"{self.path.name}: the digest of document {document} is not that of its tokens")
        report(1.0)

    def _array(self, section: Section) -> NDArray[Any]:
        place = self.header.sections[section]
        part = self._bytes[place.offset : place.offset + place.size]
        return part.view(DTYPES[section]).reshape(self.header.shape(section))


def segment_bytes(documents: Documents, min_count: int = 1, report: Report = nobody) -> list[NDArray[np.uint8]]:
    """Build a segment; the pieces of its file, in order.

    Same documents, same bytes.

    Args:
        min_count: see `compact_suffix_automaton`; so is `report`.

    Raises:
        MissingPackageError: pydivsufsort is not installed.
        SectionError: more than 2**31 - 1 tokens.
    """
    if len(documents.tokens) + len(documents) >= 2**31:
        raise SectionError(f"a segment holds at most {2**31 - 1} tokens, given {len(documents.tokens)}")
    text, starts = documents.text()
    nodes, edges = compact_suffix_automaton(text, min_count, report)
    names = [name.encode("utf-8", "replace") for name in documents.names]
    name_offsets = np.zeros(len(names) + 1, np.int64)
    np.cumsum([len(name) for name in names], out=name_offsets[1:])
    arrays: dict[Section, NDArray[Any]] = {
        Section.TEXT: text,
        Section.NODES: nodes,
        Section.EDGES: edges,
        Section.STARTS: starts,
        Section.NAME_OFFSETS: name_offsets,
        Section.NAMES: np.frombuffer(b"".join(names), np.uint8),
        Section.DIGESTS: documents.digests(),
    }
    return pack_segment(arrays, min_count)


def pack_segment(arrays: Mapping[Section, NDArray[Any]], min_count: int) -> list[NDArray[np.uint8]]:
    """The pieces of a segment's file: header, then sections with the padding between them."""
    raw = {
        section: np.ascontiguousarray(array, DTYPES[section]).reshape(-1).view(np.uint8)
        for section, array in arrays.items()
    }
    offsets, size = layout({section: part.nbytes for section, part in raw.items()})
    places = {section: Place(offsets[section], raw[section].nbytes, digest(raw[section])) for section in Section}
    header = Header(
        size,
        len(arrays[Section.TEXT]),
        len(arrays[Section.STARTS]) - 1,
        len(arrays[Section.NODES]),
        len(arrays[Section.EDGES]),
        min_count,
        places,
    )
    pieces = [np.frombuffer(header.pack(), np.uint8)]
    at = HEADER_BYTES
    for section in Section:
        pieces.append(np.zeros(offsets[section] - at, np.uint8))
        pieces.append(raw[section])
        at = offsets[section] + raw[section].nbytes
    return pieces

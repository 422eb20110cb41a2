"""The byte layout of a segment: constants, and the header to and from bytes. Spec: docs/index-format.md."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from freedraft.retrieval.index.errors import (
    ByteOrderError,
    ChecksumError,
    MagicError,
    OversizedError,
    SectionError,
    TruncatedError,
    VersionError,
)

MAGIC = b"FDSEGMNT"
VERSION = 1
BYTE_ORDER = 0x01020304
ALIGNMENT = 64
DIGEST_BYTES = 16
BORDER = -1
"""What stands in the text after each document."""


class Section(IntEnum):
    """The sections of a segment, all of them present, each once."""

    TEXT = 1
    NODES = 2
    EDGES = 3
    STARTS = 4
    NAME_OFFSETS = 5
    NAMES = 6
    DIGESTS = 7


# Fields of a node, int32 each.
LENGTH, LINK, COUNT, END, EDGES, DEGREE, TOKEN, TARGET, LABEL, TIMES = range(10)
NODE_FIELDS = 10
# Fields of an edge, int32 each; the likeliest edge of a node lies in the node itself.
EDGE_TOKEN, EDGE_TARGET, EDGE_LABEL, EDGE_TIMES = range(4)
EDGE_FIELDS = 4

DTYPES: dict[Section, np.dtype[Any]] = {
    Section.TEXT: np.dtype("<i4"),
    Section.NODES: np.dtype("<i4"),
    Section.EDGES: np.dtype("<i4"),
    Section.STARTS: np.dtype("<i8"),
    Section.NAME_OFFSETS: np.dtype("<i8"),
    Section.NAMES: np.dtype("u1"),
    Section.DIGESTS: np.dtype("u1"),
}

# magic, version, byte order, file size, text length, documents, nodes, edges, smallest count, sections
_HEAD = struct.Struct("<8sIIQQQQQII")
# kind, zero, offset, size, digest
_ENTRY = struct.Struct("<IIQQ16s")
HEADER_BYTES = _HEAD.size + len(Section) * _ENTRY.size + DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Place:
    """Where a section lies: bytes from the start of the file, and the BLAKE2b-128 digest of its bytes."""

    offset: int
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A segment's header.

    Attributes:
        file_size: bytes.
        text: tokens, borders included.
        documents: how many.
        nodes: how many, the root included.
        edges: how many, without those that lie in nodes.
        min_count: continuations seen fewer times were dropped.
        sections: all of them.
    """

    file_size: int
    text: int
    documents: int
    nodes: int
    edges: int
    min_count: int
    sections: Mapping[Section, Place]

    @property
    def tokens(self) -> int:
        """Tokens of all documents, borders not included."""
        return self.text - self.documents

    def shape(self, section: Section) -> tuple[int, ...]:
        """The shape of a section's array, -1 where the file alone says it."""
        return {
            Section.TEXT: (self.text,),
            Section.NODES: (self.nodes, NODE_FIELDS),
            Section.EDGES: (self.edges, EDGE_FIELDS),
            Section.STARTS: (self.documents + 1,),
            Section.NAME_OFFSETS: (self.documents + 1,),
            Section.NAMES: (-1,),
            Section.DIGESTS: (self.documents, DIGEST_BYTES),
        }[section]

    def pack(self) -> bytes:
        """The header's bytes, `HEADER_BYTES` of them, its own digest last."""
        head = _HEAD.pack(
            MAGIC, VERSION, BYTE_ORDER, self.file_size, self.text, self.documents, self.nodes, self.edges,
            self.min_count, len(self.sections),
        )  # fmt: skip
        table = b"".join(_ENTRY.pack(kind, 0, p.offset, p.size, p.digest) for kind, p in self.sections.items())
        return head + table + digest(head + table)


def digest(content: Any) -> bytes:
    """BLAKE2b-128 of anything that has a buffer."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def layout(sizes: Mapping[Section, int]) -> tuple[dict[Section, int], int]:
    """The offset of each section, given their sizes in bytes, and the size of the file."""
    offsets = {}
    at = HEADER_BYTES
    for section in Section:
        at = -(-at // ALIGNMENT) * ALIGNMENT
        offsets[section] = at
        at += sizes[section]
    return offsets, at


def parse_header(content: bytes, size: int, name: str) -> Header:
    """Read and check a header.

    Args:
        content: the first `HEADER_BYTES` bytes of the file, fewer if it is shorter.
        size: bytes of the file.
        name: of the file, for messages.

    Raises:
        TruncatedError, MagicError, ByteOrderError, VersionError, ChecksumError, OversizedError, SectionError: checked
            in this order, but for a file that is shorter or longer than its header says, which follows the checksum.
    """
    if sys.byteorder != "little":
        raise ByteOrderError(f"{name}: segments are little-endian, and this machine is not")
    if len(content) < len(MAGIC):
        raise TruncatedError(f"{name}: {size} bytes, expected at least a header of {HEADER_BYTES}")
    if content[: len(MAGIC)] != MAGIC:
        raise MagicError(f"{name}: starts with {content[:8]!r}, expected {MAGIC!r}: not a freedraft segment")
    if len(content) < HEADER_BYTES:
        raise TruncatedError(f"{name}: {size} bytes, expected at least a header of {HEADER_BYTES}")
    _, version, order, file_size, text, documents, nodes, edges, min_count, count = _HEAD.unpack_from(content)
    if order != BYTE_ORDER:
        raise ByteOrderError(f"{name}: byte order mark {order:#010x}, expected {BYTE_ORDER:#010x}")
    if version != VERSION:
        raise VersionError(
            f"{name}: format version {version}, this freedraft reads version {VERSION}: update it, or build anew"
        )
    if digest(content[: HEADER_BYTES - DIGEST_BYTES]) != content[HEADER_BYTES - DIGEST_BYTES : HEADER_BYTES]:
        raise ChecksumError(f"{name}: the header's checksum is wrong")
    if size < file_size:
        raise TruncatedError(f"{name}: {size} bytes, the header says {file_size}")
    if size > file_size:
        raise OversizedError(f"{name}: {size} bytes, the header says {file_size}")
    if count != len(Section):
        raise SectionError(f"{name}: {count} sections, expected {len(Section)}")
    sections: dict[Section, Place] = {}
    for i in range(count):
        kind, _, offset, length, checksum = _ENTRY.unpack_from(content, _HEAD.size + i * _ENTRY.size)
        if kind not in Section.__members__.values():
            raise SectionError(f"{name}: unknown section {kind}")
        if Section(kind) in sections:
            raise SectionError(f"{name}: section {Section(kind).name} is there twice")
        sections[Section(kind)] = Place(offset, length, checksum)
    header = Header(file_size, text, documents, nodes, edges, min_count, sections)
    _check_sections(header, name)
    return header


def _check_sections(header: Header, name: str) -> None:
    # Positions and indices are int32 in the file.
    for what, number in (("text", header.text), ("nodes", header.nodes), ("edges", header.edges)):
        if number >= 2**31:
            raise SectionError(f"{name}: {number} {what}, at most {2**31 - 1} are possible")
    if header.nodes < 1:
        raise SectionError(f"{name}: no root")
    if header.documents > header.text:
        raise SectionError(f"{name}: {header.documents} documents in a text of {header.text}")
    end = HEADER_BYTES
    for section, place in sorted(header.sections.items(), key=lambda item: (item[1].offset, item[1].size)):
        if place.offset % ALIGNMENT:
            raise SectionError(f"{name}: section {section.name} at {place.offset} is not aligned to {ALIGNMENT}")
        if place.offset < end:
            raise SectionError(f"{name}: section {section.name} at {place.offset} overlaps what ends at {end}")
        end = place.offset + place.size
        if end > header.file_size:
            raise SectionError(f"{name}: section {section.name} ends at {end}, the file at {header.file_size}")
        shape = header.shape(section)
        if -1 not in shape and place.size != int(np.prod(shape, dtype=object)) * DTYPES[section].itemsize:
            raise SectionError(f"{name}: section {section.name} has {place.size} bytes, expected shape {shape}")

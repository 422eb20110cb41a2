"""The manifest: what an index consists of, a JSON file that is written last. Spec: docs/index-format.md."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freedraft.retrieval.index.errors import ManifestError, NotFoundError, VersionError
from freedraft.retrieval.index.files import open_regular

MANIFEST = "manifest.json"
FORMAT = "freedraft index"
VERSION = 1
MAX_BYTES = 2**26
SEGMENT_NAME = re.compile(r"[0-9a-f]{16}\.segment")


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """The tokenizer that an index was built with.

    Attributes:
        name: where it was then, for messages; two names may stand for one tokenizer.
        fingerprint: see `fingerprint.tokenizer_fingerprint`.
        vocabulary_size: token ids are below this.
    """

    name: str
    fingerprint: str
    vocabulary_size: int


@dataclass(frozen=True, slots=True)
class SegmentEntry:
    """A segment of an index.

    Attributes:
        file: its name in the index's folder.
        size: bytes.
        documents, tokens: how many it holds.
        digest: of its header, which has those of its sections; hexadecimal.
    """

    file: str
    size: int
    documents: int
    tokens: int
    digest: str


@dataclass(frozen=True, slots=True)
class Reading:
    """How the sources of a build were read: the options of `SourceOptions`."""

    format: str
    field: str
    chat: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index consists of.

    Attributes:
        tokenizer: that all its documents were tokenised with.
        min_count: continuations seen fewer times in a segment were dropped.
        dedup: documents whose tokens are there already are left out.
        sources: where documents came from.
        segments: in the order in which they were added.
        reading: how the build read its sources; None = not recorded.
    """

    tokenizer: TokenizerEntry
    min_count: int = 1
    dedup: bool = False
    sources: tuple[str, ...] = ()
    segments: tuple[SegmentEntry, ...] = ()
    reading: Reading | None = None

    def to_json(self) -> str:
        """The manifest file's text."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        if self.reading is None:
            del values["reading"]
        return json.dumps(values, indent=1) + "\n"


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the index in `folder`.

    Raises:
        NotFoundError: there is none.
        NotAFileError: it is a link, a folder, a pipe or a device.
        VersionError: of a newer freedraft.
        ManifestError: not a manifest, or one that names what it must not.
    """
    path = Path(folder) / MANIFEST
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{folder}: no index there (it would have a {MANIFEST})") from error
    except OSError as error:
        raise ManifestError(f"{path}: {error}") from error
    if len(content) > MAX_BYTES:
        raise ManifestError(f"{path}: more than {MAX_BYTES} bytes")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON: {error}") from error
    return parse_manifest(values, str(path))


def parse_manifest(values: Any, name: str) -> Manifest:
    """Check what a manifest's JSON holds.

    Args:
        values: as parsed.
        name: of the file, for messages.

    Raises:
        VersionError, ManifestError: as `read_manifest`.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ManifestError(f"{name}: not the manifest of a {FORMAT}")
    version = values.get("version")
    if isinstance(version, int) and version > VERSION:
        raise VersionError(f"{name}: version {version}, this freedraft reads version {VERSION}: update it")
    # True and 1.0 equal 1.
    if type(version) is not int or version != VERSION:
        raise ManifestError(f"{name}: version: expected {VERSION}, got {version!r}")
    tokenizer = _field(values, "tokenizer", dict, name)
    entry = TokenizerEntry(
        _field(tokenizer, "name", str, f"{name}: tokenizer"),
        _field(tokenizer, "fingerprint", str, f"{name}: tokenizer"),
        _count(tokenizer, "vocabulary_size", f"{name}: tokenizer"),
    )
    segments = tuple(_segment(item, name) for item in _field(values, "segments", list, name))
    if len({segment.file for segment in segments}) != len(segments):
        raise ManifestError(f"{name}: segments: one file is named twice")
    sources = _strings(values, "sources", name)
    min_count = _count(values, "min_count", name)
    if not 1 <= min_count < 2**32:
        raise ManifestError(f"{name}: min_count: expected 1 to {2**32 - 1}, got {min_count}")
    dedup = _field(values, "dedup", bool, name)
    return Manifest(entry, min_count, dedup, sources, segments, _reading(values, name))


def _reading(values: dict[str, Any], name: str) -> Reading | None:
    if "reading" not in values:
        return None
    reading, where = _field(values, "reading", dict, name), f"{name}: reading"
    return Reading(
        *(_field(reading, key, str, where) for key in ("format", "field", "chat")),
        *(_strings(reading, key, where) for key in ("include", "exclude")),
    )


def _segment(item: Any, name: str) -> SegmentEntry:
    where = f"{name}: segments"
    if not isinstance(item, dict):
        raise ManifestError(f"{where}: expected a list of objects, got {item!r}")
    file = _field(item, "file", str, where)
    # No path, and no other name either: a manifest must not lead out of its folder.
    if not SEGMENT_NAME.fullmatch(file):
        raise ManifestError(f"{where}: file: expected 16 hexadecimal digits and .segment, got {file!r}")
    return SegmentEntry(
        file,
        _count(item, "size", where),
        _count(item, "documents", where),
        _count(item, "tokens", where),
        _field(item, "digest", str, where),
    )


def _count(values: dict[str, Any], key: str, where: str) -> int:
    number: int = _field(values, key, int, where)
    if number < 0:
        raise ManifestError(f"{where}: {key}: expected 0 or more, got {number}")
    return number


def _strings(values: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    strings = _field(values, key, list, where)
    if not all(isinstance(one, str) for one in strings):
        raise ManifestError(f"{where}: {key}: expected a list of strings")
    return tuple(strings)


def _field(values: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in values:
        raise ManifestError(f"{where}: {key} is missing")
    value = values[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ManifestError(f"{where}: {key}: expected {kind.__name__}, got {value!r}")
    return value

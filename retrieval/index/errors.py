"""What can go wrong with an index on disk, each case by its own name."""

from __future__ import annotations

from freedraft.retrieval.errors import FreedraftError


class CorpusIndexError(FreedraftError):
    """Base of every error about an index on disk; the message names the file."""


class NotFoundError(CorpusIndexError, FileNotFoundError):
    """The folder is not there, or holds no index."""


class NotAFileError(CorpusIndexError):
    """What should be a file of the index is a link, a folder, a pipe or a device."""


class MagicError(CorpusIndexError):
    """The file does not start as a segment does."""


class ByteOrderError(CorpusIndexError):
    """The segment, or this machine, is not little-endian."""


class VersionError(CorpusIndexError):
    """Written by a newer freedraft."""


class TruncatedError(CorpusIndexError):
    """The file ends early."""


class OversizedError(CorpusIndexError):
    """The file goes on after its end."""


class SectionError(CorpusIndexError):
    """A section is missing, twice there, overlapping, misaligned, out of the file, or of the wrong size."""


class ChecksumError(CorpusIndexError):
    """Bytes differ from what was written."""


class DamagedError(CorpusIndexError):
    """A link, an edge or a document border points where it must not."""


class ManifestError(CorpusIndexError):
    """The manifest is not valid, or does not fit the segments that it names."""


class LockedError(CorpusIndexError):
    """Another process is writing the index; the message says which."""


class TokenizerMismatchError(CorpusIndexError, ValueError):
    """The index was built with another tokenizer than the one at hand."""


class SourceError(CorpusIndexError, ValueError):
    """An input cannot be read; the message gives the file and, where it can, the line."""


class MissingPackageError(CorpusIndexError, ImportError):
    """A package of the `index` extra is not installed."""

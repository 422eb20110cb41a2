"""Bytes from files, gzip and zstd unpacked on the way, and lines from bytes; memory stays bounded."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from freedraft.retrieval.build.extras import require

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# A zstd skippable frame may come first; pzstd writes one.
ZSTD_SKIPPABLE = tuple(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60))
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")
STANDARD_INPUT = "-"

ReportBytes = Callable[[int], None]


def open_stream(path: str, report: ReportBytes | None = None) -> IO[bytes]:
    """Open a file, or standard input for "-", and unpack it if its first bytes say gzip or zstd.

    Args:
        report: called with the number of bytes of the file, still packed, at each read.

    Raises:
        OSError: it cannot be opened. Reading raises one of `stream_errors()` where the file is damaged.
        MissingPackageError: a zstd file, and zstandard is not installed.
    """
    # The stream that is returned closes it.
    raw = sys.stdin.buffer if path == STANDARD_INPUT else open(path, "rb")  # noqa: SIM115
    packed = io.BufferedReader(_Reported(raw, report), CHUNK_BYTES)
    magic = packed.peek(4)[:4]
    if magic[:2] == GZIP_MAGIC:
        return io.BufferedReader(_Owning(gzip.GzipFile(fileobj=packed), packed), CHUNK_BYTES)
    if magic == ZSTD_MAGIC or magic in ZSTD_SKIPPABLE:
        return io.BufferedReader(_Zstd(packed), CHUNK_BYTES)
    return packed


def stream_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged or vanished file raises."""
    return (OSError, EOFError, zlib.error)


def lines_of(stream: IO[bytes], limit: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and bytes of each line, line end included; None for one longer than `limit`."""
    number = 0
    while line := stream.readline(limit):
        number += 1
        if len(line) < limit or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
            pass
        yield number, None


def without_compression(path: str) -> str:
    """The path less the suffix of a compressed file."""
    for suffix in COMPRESSED_SUFFIXES:
        if path.lower().endswith(suffix):
            return path[: -len(suffix)]
    return path


class _Reported(io.RawIOBase):
    """A file that says how much was read from it; closes it, but for standard input."""

    def __init__(self, raw: IO[bytes], report: ReportBytes | None) -> None:
        self._raw = raw
        self._report = report

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._raw.read1(len(buffer))  # type: ignore[attr-defined]
        got = len(content)
        buffer[:got] = content
        if self._report is not None:
            self._report(got)
        return got

    def close(self) -> None:
        if self._raw is not sys.stdin.buffer:
            self._raw.close()
        super().close()


class _Owning(io.RawIOBase):
    """A stream that closes the one below it too."""

    def __init__(self, upper: Any, lower: IO[bytes]) -> None:
        self._upper = upper
        self._lower = lower

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._upper.readinto(buffer))

    def close(self) -> None:
        self._upper.close()
        self._lower.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Unpacks one zstd frame after another; a file that ends within one is an error, unlike in zstandard's reader."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._zstandard = require("zstandard", "reading a zstd file")
        self._packed = packed
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                # A little at a time: nothing else bounds how much a frame of zeros unpacks to.
                self._input = self._packed.read(1 << 12)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the zstd file ends early")
                return 0
            if self._frame is None:
                # 2 GiB is what `zstd --long=31` may ask for.
                self._frame = self._zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstandard.ZstdError as error:
                raise OSError(f"not valid zstd: {error}") from error
            self._input = b""
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def close(self) -> None:
        self._packed.close()
        super().close()

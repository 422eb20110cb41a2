"""Text files, decoded and cut into pieces of bounded size."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

from freedraft.retrieval.build.problems import ProblemKind, Problems

PIECE_CHARACTERS = 1 << 20
"""Longer texts are cut at a line's end: what goes to the tokenizer at once stays small."""
BINARY_LOOK_BYTES = 8192


def looks_binary(head: bytes) -> bool:
    """Whether a file that starts with `head` is not text: it has a zero byte, as git decides it."""
    return b"\0" in head[:BINARY_LOOK_BYTES]


def read_text(stream: IO[bytes], place: str, problems: Problems) -> Iterator[str]:
    """The pieces of a UTF-8 text, each of about `PIECE_CHARACTERS` at most.

    A line that is not valid UTF-8 is left out, and the text before it and the text after it are pieces of their own:
    what stood on either side of the gap never looks like neighbours.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    parts: list[str] = []
    size = 0
    number = 1
    more = True
    while more:
        # Bounded, so part of a line if the line is long.
        line = stream.readline(PIECE_CHARACTERS)
        ends = line.endswith(b"\n")
        more = ends or len(line) == PIECE_CHARACTERS
        gap = False
        try:
            text = decoder.decode(line, final=ends or not more)
            if text:
                parts.append(text)
                size += len(text)
        except UnicodeDecodeError as error:
            problems.add(ProblemKind.UNDECODABLE, f"{place}:{number}", f"not valid UTF-8: {error.reason}")
            decoder.reset()
            gap = True
        if parts and (gap or not more or size >= PIECE_CHARACTERS):
            yield "".join(parts)
            parts, size = [], 0
        number += ends


def cut(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most `PIECE_CHARACTERS`, at lines' ends where there are any."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        if end <= start:
            end = start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]

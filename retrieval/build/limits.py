"""How large a segment may be for a build to stay within its memory."""

from __future__ import annotations

import re

from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.construct import BUILD_BYTES_A_TOKEN

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
MAIN_BYTES = 512 << 20
"""What this process takes with the tokenizer and the libraries loaded, and the texts in its hands."""
WORKER_BYTES = 256 << 20
"""What a worker process takes before it begins."""
WAITING_BYTES_A_TOKEN = 12
"""A portion that is being collected, handed over or waiting: its tokens, and what its documents' names come to."""
SMALLEST_SEGMENT = 1 << 16
LARGEST_SEGMENT = 2**31 - 1
PARALLEL_SEGMENT = 1 << 20
"""Segments are not made smaller than this only so that all workers have one."""
BYTES_A_TOKEN_OF_TEXT = 4


def parse_size(text: str) -> int:
    """Bytes from a number and a unit: "900MB", "4GiB", "1.5 GiB", "1000000".

    Raises:
        InputError: not such a text.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if not match or match[2].lower() not in UNITS:
        raise InputError(f"expected a size like 900MB or 4GiB, got {text!r}")
    size = float(match[1]) * UNITS[match[2].lower()]
    if size >= 2**63:
        raise InputError(f"expected a size below 8 million TiB, got {text!r}")
    return int(size)


def segment_tokens(max_memory: int, workers: int, total_bytes: int | None = None) -> int:
    """The most tokens, borders included, that a segment may have.

    Args:
        max_memory: bytes, for all processes of the build together.
        workers: processes that build segments; 0 = this one does it.
        total_bytes: of the sources, if known: several workers then share a small corpus evenly.

    Raises:
        InputError: the memory is not enough for even a small segment; the message says what is.
    """
    building = max(1, workers) * BUILD_BYTES_A_TOKEN + (2 * workers + 2) * WAITING_BYTES_A_TOKEN
    fixed = MAIN_BYTES + workers * WORKER_BYTES
    tokens = min((max_memory - fixed) // building, LARGEST_SEGMENT)
    if tokens < SMALLEST_SEGMENT:
        least = fixed + SMALLEST_SEGMENT * building
        with_workers = f" with {workers} workers" if workers else ""
        raise InputError(
            f"--max-memory: {max_memory >> 20} MiB is too little{with_workers}: at least {1 + (least >> 20)} MiB"
        )
    if workers > 1 and total_bytes is not None:
        share = total_bytes // BYTES_A_TOKEN_OF_TEXT // workers
        tokens = min(tokens, max(share, PARALLEL_SEGMENT))
    return tokens

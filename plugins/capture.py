"""Capture: replies that have ended, gathered in memory for a thread that writes them to an index now and then."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from random import uniform
from time import monotonic

import numpy as np

from freedraft.plugins.background import at_exit, start_thread
from freedraft.plugins.captured import BYTES_A_TOKEN, SHARE, append, is_busy, prepare
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.errors import ConfigError
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.errors import CorpusIndexError, LockedError
from freedraft.retrieval.index.fingerprint import tokenizer_fingerprint
from freedraft.retrieval.index.manifest import TokenizerEntry
from freedraft.retrieval.index.segment import segment_bytes
from freedraft.retrieval.ragged import Int32

logger = logging.getLogger("freedraft")

KEPT = 16
"""Times the tokens of a segment that are gathered at most, while they cannot be written."""

LONGEST_WAIT = 600.0
"""Seconds after which less than a segment's tokens are written too: who is killed loses no more."""

BUSY_SECONDS = 0.5
FAILURE_SECONDS = 60.0
EXIT_SECONDS = 3.0
EXIT_TRY_SECONDS = 0.05


class Capture:
    """Writes replies to the index of captured replies in a folder, from a thread of its own.

    Nothing that goes wrong there reaches who adds a reply. What is gathered is written at the normal end of the
    process, if that takes no longer than `EXIT_SECONDS`; a process that is killed loses it.

    Args:
        folder: of the index; made if it is not there.
        tokenizer: the model's.
        max_size: bytes of the index's segments.
        tokens: how many to gather for a segment.

    Attributes:
        written: tokens handed to the index; it leaves out replies that it has.
        dropped: tokens that could not be written, the oldest first, for want of room or at the end of the process, and
            those of replies with a token that the tokenizer does not have.
        failures: attempts that failed, other than because another process was writing.

    Raises:
        ConfigError: the folder has an index that was not made by capture, or cannot be made.
        CorpusIndexError: the index is damaged, or has another tokenizer.
        MissingPackageError: a package of the `index` extra is not installed.
    """

    def __init__(self, folder: Path, tokenizer: TokenizerEntry, max_size: int, tokens: int) -> None:
        self.folder = folder
        self.written = 0
        self.dropped = 0
        self.failures = 0
        self._tokenizer = tokenizer
        self._max_size = max_size
        # Of a segment that is to be merged with others, and a last reply can double it.
        self._tokens = max(2, min(tokens, max_size // (2 * SHARE * BYTES_A_TOKEN)))
        _warm_up()
        try:
            prepare(folder, tokenizer)
        except LockedError as error:
            raise ConfigError(f"capture: {error}") from error
        except OSError as error:
            if isinstance(error, CorpusIndexError):
                raise
            raise ConfigError(f"capture: {folder}: cannot be made, or not be written: {error}") from error
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._gathered: deque[tuple[str, Int32]] = deque()
        self._gathered_tokens = 0
        self._in_hand = 0
        self._number = 0
        self._end: float | None = None
        self._at_exit = at_exit(self.close)

    def add(self, replies: Iterable[Int32]) -> None:
        """Take replies, int32 `(t,)` each; never waits for the disk, and raises nothing."""
        if os.getpid() != self._process:
            # A fork takes no threads along. What was gathered is the parent's.
            self._begin()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._changed:
            if self._end is not None:
                return
            for reply in replies:
                if len(reply) and int(reply.max()) >= self._tokenizer.vocabulary_size:
                    self.dropped += len(reply)
                    continue
                # A last token alone leads nowhere.
                for start in range(0, len(reply) - 1, self._tokens):
                    self._number += 1
                    piece = reply[start : start + self._tokens]
                    self._gathered.append((f"{now}-{self._process}-{self._number}", piece))
                    self._gathered_tokens += len(piece)
            self._drop_oldest()
            if self._thread is None and self._gathered:
                self._thread = start_thread(self._run, "freedraft-capture", self._failed)
            if self._gathered_tokens >= self._tokens:
                self._changed.notify()

    def close(self) -> None:
        """Write what is gathered, as far as `EXIT_SECONDS` allow, and take no more."""
        if os.getpid() != self._process:
            return
        with self._changed:
            if self._end is not None:
                return
            self._end = monotonic() + EXIT_SECONDS
            self._changed.notify()
        self._at_exit.cancel()
        if self._thread is not None:
            self._thread.join(max(0.0, self._end - monotonic()))
        with self._changed:
            lost = self._gathered_tokens + self._in_hand
        self.dropped += lost
        if lost:
            logger.warning("freedraft: capture: %d tokens could not be written to %s at the end", lost, self.folder)

    def _run(self) -> None:
        _use_one_core()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._gathered_tokens >= self._tokens or self._end is not None, LONGEST_WAIT
                )
                batch = self._take()
                if not batch and self._end is not None:
                    return
            if not batch:
                continue
            wait = self._write(batch)
            with self._changed:
                self._in_hand = 0
                if wait:
                    self._gathered.extendleft(reversed(batch))
                    self._gathered_tokens += _tokens_of(batch)
                    self._drop_oldest()
                    if not self._wait(wait):
                        return

    def _wait(self, seconds: float) -> bool:
        """Wait before the next attempt; False if there is to be none. Holds `_changed`."""
        if self._end is None:
            self._changed.wait_for(lambda: self._end is not None, seconds)
        elif seconds == FAILURE_SECONDS:
            return False
        else:
            self._changed.wait(EXIT_TRY_SECONDS)
        return self._end is None or monotonic() < self._end

    def _take(self) -> list[tuple[str, Int32]]:
        """The oldest replies for one segment. Holds `_changed`."""
        batch = []
        tokens = 0
        while self._gathered and tokens < self._tokens:
            batch.append(self._gathered.popleft())
            tokens += len(batch[-1][1])
        self._gathered_tokens -= tokens
        self._in_hand = tokens
        return batch

    def _write(self, batch: list[tuple[str, Int32]]) -> float:
        """Write a segment; 0 if that is done with, otherwise the seconds after which to try again."""
        try:
            in_haste = self._end is not None
            append(self.folder, self._tokenizer, Documents.of(batch), self._max_size, in_haste)
        except Exception as error:
            if isinstance(error, LockedError) and is_busy(error):
                # Others that wait are not to come back at the same moment.
                return uniform(1, 3) * BUSY_SECONDS
            self._failed(error)
            if isinstance(error, OSError | CorpusIndexError | ConfigError):
                return FAILURE_SECONDS
            # It might be the text itself, and would be again.
            self.dropped += _tokens_of(batch)
        else:
            self.written += _tokens_of(batch)
        return 0

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            logger.warning(
                "freedraft: capture: replies could not be written to %s: %s: %s; drafting goes on, and the newest %d "
                "tokens are kept to be tried again; said once",
                self.folder,
                type(error).__name__,
                error,
                KEPT * self._tokens,
            )

    def _drop_oldest(self) -> None:
        """Keep within bounds what is gathered. Holds `_changed`."""
        while self._gathered_tokens > KEPT * self._tokens:
            tokens = len(self._gathered.popleft()[1])
            self._gathered_tokens -= tokens
            self.dropped += tokens


def open_capture(folder: str | None, tokenizer: str | None, scope: str, max_size: int, tokens: int) -> Capture | None:
    """What a drafter's settings ask for; None if they do not.

    Raises:
        ConfigError: no tokenizer, or a scope that has no earlier replies; and as `Capture`.
        SourceError: the tokenizer cannot be read.
    """
    if folder is None:
        return None
    if tokenizer is None:
        raise ConfigError(
            "capture: needs the setting `tokenizer`, the model's tokenizer.json or the folder that has it: the index "
            "remembers which tokens its replies are made of"
        )
    if scope == "off":
        raise ConfigError(
            "capture: keeps replies for other requests to be drafted from, which `scope: off` rules out; leave one out"
        )
    source = Tokenizer(tokenizer)
    entry = TokenizerEntry(source.name, tokenizer_fingerprint(source.path), source.vocabulary_size)
    return Capture(Path(folder).expanduser(), entry, max_size, tokens)


def _warm_up() -> None:
    """See that all is installed and compiled, rather than in the middle of requests."""
    errors = []

    def build() -> None:
        _use_one_core()
        try:
            segment_bytes(Documents.of([("", np.arange(2, dtype=np.int32))]))
        except Exception as error:
            errors.append(error)

    # In a thread, for this one's OpenMP may be the model's too.
    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _use_one_core() -> None:
    """Have libdivsufsort sort in this thread alone, if it was built with OpenMP.

    A team of threads would take cores from the model, and hangs in a child of a process that has had one.
    """
    with suppress(ImportError, AttributeError):
        from pydivsufsort.dll import libdivsufsort

        libdivsufsort.omp_set_num_threads(1)


def _tokens_of(batch: list[tuple[str, Int32]]) -> int:
    return sum(len(tokens) for _, tokens in batch)

"""Saving: what fusion's predictor has learnt is written to a file now and then, and at the end of the process."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from time import monotonic

from freedraft.plugins.background import at_exit, start_thread
from freedraft.plugins.mixing import Mixer
from freedraft.plugins.mixing_file import read_mixer, write_mixer
from freedraft.retrieval.errors import ConfigError, InputError

logger = logging.getLogger("freedraft")

TOKENS = 2**13
"""Tokens to learn from before the file is written anew, if `SECONDS` have passed as well."""

SECONDS = 60.0
EXIT_SECONDS = 3.0


class Saving:
    """Writes a mixer to a file, from a thread of its own, and at the end of `owner` or of the process.

    Nothing that goes wrong there reaches who tells of tokens. The file is always a whole one. It is not touched before
    something was learnt. A process that is killed loses what came after the last writing.

    Args:
        path: of the file, in a folder that is there.
        owner: the drafter.

    Attributes:
        failures: attempts that failed.

    Raises:
        ConfigError: there can be no such file, or there is one that is something else.
    """

    def __init__(self, path: Path, owner: object) -> None:
        self.path = full(path)
        _check(self.path)
        self.failures = 0
        self._begin(owner)

    def _begin(self, owner: object = None) -> None:
        self._process = os.getpid()
        self._mixer: Mixer | None = None
        # Two counts, each of which one thread alone adds to.
        self._learnt = 0
        self._saved = 0
        self._due = monotonic() + SECONDS
        self._thread: threading.Thread | None = None
        self._at_exit = at_exit(self.close, owner)

    def learnt(self, mixer: Mixer, tokens: int) -> None:
        """Tell that `mixer` has learnt from so many more tokens; never waits for the disk, and raises nothing."""
        if os.getpid() != self._process:
            # A fork takes no threads along.
            self._begin()
        self._mixer = mixer
        self._learnt += tokens
        if self._learnt - self._saved >= TOKENS and monotonic() >= self._due and not self._is_writing():
            self._due = monotonic() + SECONDS
            self._thread = start_thread(self._write, "freedraft-saving", self._failed)

    def close(self) -> None:
        """Write what is new; a thread that is writing is waited for, but no longer than `EXIT_SECONDS`."""
        # The drafter can be collected as garbage in any thread.
        if os.getpid() != self._process or self._thread is threading.current_thread():
            return
        if self._thread is not None:
            self._thread.join(EXIT_SECONDS)
        if self._learnt > self._saved and not self._is_writing():
            self._write()

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self) -> None:
        # It may go on learning meanwhile. Each number is a whole one, and if some are a token older no harm is done.
        assert self._mixer is not None
        learnt = self._learnt
        try:
            write_mixer(self._mixer, self.path)
        except Exception as error:
            self._failed(error)
        else:
            self._saved = learnt

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            logger.warning(
                "freedraft: save_learnt: %s could not be written: %s: %s; drafting goes on, and it is tried again; "
                "said once",
                self.path,
                type(error).__name__,
                error,
            )


def _check(path: Path) -> None:
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"save_learnt: {path}: expected a file in a folder that is there and can be written")
    if path.exists():
        try:
            read_mixer(path)
        except InputError as error:
            raise ConfigError(f"save_learnt: will not write over it: {error}; name another file") from error


def full(path: Path) -> Path:
    """Where a path of the settings leads, whatever the working folder will be."""
    return path.expanduser().absolute()

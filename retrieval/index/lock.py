"""One writer at a time: a lock on an index's folder that says who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from freedraft.retrieval.index.errors import LockedError

LOCK = ".lock"


class WriterLock:
    """The lock, held from `__init__` to `release` or the end of the process, however that comes.

    Raises:
        LockedError: another process, or this one, holds it; the message says which, where and since when.
    """

    def __init__(self, folder: Path) -> None:
        # The file stays: to remove it would let two writers lock two files of one name.
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(os.pread(self._file, 1000, 0))
            os.close(self._file)
            raise LockedError(f"{folder}: being written by {holder}; try again when it is done") from error
        since = datetime.now(UTC).isoformat(timespec="seconds")
        told = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, told.encode(), 0)

    def release(self) -> None:
        """Let the next writer in."""
        os.ftruncate(self._file, 0)
        os.close(self._file)


def _holder(content: bytes) -> str:
    try:
        told = json.loads(content)
        return f"process {told['pid']} on {told['host']} since {told['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

"""One writer at a time: a lock on an index's folder that says who holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from freedraft.retrieval.index.errors import LockedError, NotAFileError, NotFoundError

LOCK = ".lock"


class WriterLock:
    """The lock, held from `__init__` to `release` or the end of the process, however that comes.

    Raises:
        LockedError: another process, or this one, holds it, and the message says which, where and since when; or the
            file system has no locks.
        NotFoundError: no such folder.
        NotAFileError: the lock is a link.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        while True:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except FileNotFoundError as error:
                raise NotFoundError(f"{folder}: the folder is not there, or was removed just now") from error
            except OSError as error:
                # What it leads to would be overwritten.
                if error.errno == errno.ELOOP:
                    raise NotAFileError(f"{self._path}: a link; remove it") from error
                raise
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = _holder(os.pread(self._file, 1000, 0))
                os.close(self._file)
                raise LockedError(f"{folder}: being written by {holder}; try again when it is done") from error
            except OSError as error:
                os.close(self._file)
                raise LockedError(
                    f"{folder}: cannot be locked: {error}; put the index on a file system with flock"
                ) from error
            if self._is_in_place():
                break
            # Removed between our opening and our locking it: whoever comes next would lock another file.
            os.close(self._file)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        told = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, told.encode(), 0)

    def release(self, remove: bool = False) -> None:
        """Let the next writer in.

        Args:
            remove: the file too, while the lock is held: for a folder that is to go.
        """
        if remove:
            self._path.unlink(missing_ok=True)
        else:
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            return False


def _holder(content: bytes) -> str:
    try:
        told = json.loads(content)
        return f"process {told['pid']} on {told['host']} since {told['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

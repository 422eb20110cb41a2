"""Opening a file of an index: a plain file in its folder, nothing that makes a reader wait or leads elsewhere."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

from freedraft.retrieval.index.errors import NotAFileError


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; never waits, as opening a named pipe would.

    Raises:
        NotAFileError: a link, a folder, a pipe or a device.
        OSError: there is none, or it cannot be opened.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # A link, and a socket.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise NotAFileError(f"{path}: not a plain file") from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise NotAFileError(f"{path}: not a plain file")
    return os.fdopen(number, "rb")

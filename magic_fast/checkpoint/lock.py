"""One run at a time into one output, by a file lock that the system drops when the run dies."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from contextlib import suppress

from magic_fast.errors import OutputError

from .fs import REAL, FileSystem

_LOG = logging.getLogger("magic_fast")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class OutputLock:
    """Holds ``path`` exclusively from construction to `release`.

    Raises:
        OutputError: another run holds it; the message names its process and machine.
    """

    def __init__(self, path: str, output: str, *, fs: FileSystem = REAL) -> None:
        self._path = path
        self._fs = fs
        self._fd: int | None = None
        while self._fd is None:
            fd = fs.open(path, os.O_RDWR | os.O_CREAT)
            try:
                _lock(fd, path, output)
                if _is_at(fd, path):  # else its holder ended and removed it in between
                    self._fd = fd
            finally:
                if self._fd is None:
                    fs.close(fd)
        with suppress(OSError):  # a full disk: others then see an unnamed holder
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self, *, remove: bool) -> None:
        """Let others in; ``remove`` the file first, while nobody else can hold it."""
        if self._fd is None:
            return
        if remove and _is_at(self._fd, self._path):
            os.unlink(self._path)
        self._fs.close(self._fd)
        self._fd = None


def _lock(fd: int, path: str, output: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 200, 0).decode("utf-8", "replace") or "a process that has just begun"
        raise OutputError(
            f"Output in use for {output}: expected to be its only writer, got a lock held by "
            f"{holder} ({path}). Wait for that run to end, or choose another output."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _LOG.warning(
            "%s: this file system has no locks; do not start a second run into %s", path, output
        )


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False

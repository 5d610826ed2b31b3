"""The few file functions that checkpoints need, as one object that tests can put faults under.

Methods raise `OSError`, and may transfer fewer bytes than asked; `read_exactly` and `write_exactly`
loop. All are safe to call from any thread: reads and writes carry their position.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # the standard library has it from Python 3.12 on
    from typing_extensions import Buffer

COPY_BLOCK_BYTES = 1 << 20
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}
_SYNC_FILE_RANGE_WRITE = 2
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The call of Linux, which Python does not have."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int]", function)


class FileSystem:
    """Real files. Subclass it to inject faults."""

    def open(self, path: str, flags: int) -> int:
        """A file descriptor, closed on exec; new files get the process's default mode."""
        return os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def stat(self, fd: int) -> os.stat_result:
        """Size, times and inode of an open file."""
        return os.fstat(fd)

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read at ``offset`` into ``buffer``: the number of bytes, 0 at the end of the file."""
        return os.preadv(fd, [buffer], offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write at ``offset``: the number of bytes written."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Set a file's size."""
        os.ftruncate(fd, nbytes)

    def allocate(self, fd: int, nbytes: int) -> None:
        """Reserve room on the disk for the first ``nbytes`` bytes (and make the file that long)."""
        os.posix_fallocate(fd, 0, nbytes)

    def fsync(self, fd: int) -> None:
        """Force a file or folder to the disk."""
        os.fsync(fd)

    def start_writing(self, fd: int, offset: int, nbytes: int) -> None:
        """Let the disk begin with a range of a file that was written, without waiting for it; where
        the system cannot, it begins when it likes."""
        begin = _sync_file_range()
        if begin is not None:
            begin(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)

    def rename(self, source: str, target: str) -> None:
        """Move within one file system, atomically."""
        os.rename(source, target)

    def free_bytes(self, path: str) -> int:
        """Bytes that an ordinary user may still write to the file system of ``path``."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def preallocate(self, fd: int, nbytes: int) -> None:
        """`allocate`, or only set the size where the system or file system cannot reserve."""
        if nbytes:
            try:
                self.allocate(fd, nbytes)
                return
            except AttributeError:  # macOS has no posix_fallocate
                pass
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise
        self.truncate(fd, nbytes)

    def read_exactly(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes only where the file ends."""
        done = 0
        while done < len(buffer):
            count = self.pread(fd, buffer[done:], offset + done)
            if count == 0:
                break
            done += count
        return done

    def write_exactly(self, fd: int, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        done = 0
        while done < len(data):
            count = self.pwrite(fd, data[done:], offset + done)
            if count <= 0:
                raise OSError(errno.EIO, "the system accepted no bytes")
            done += count

    @contextmanager
    def new_file(self, path: str) -> Iterator[int]:
        """Create a file, or empty it, and keep it open for the length of the block."""
        fd = self.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            yield fd
        finally:
            self.close(fd)

    def fsync_path(self, path: str) -> None:
        """`fsync` of a file or folder by name."""
        fd = self.open(path, os.O_RDONLY)
        try:
            self.fsync(fd)
        finally:
            self.close(fd)


#: The real file system, the default everywhere.
REAL = FileSystem()


def as_bytes(buffer: Buffer) -> memoryview:
    """A flat view of unsigned bytes; TypeError for what is not contiguous or has no buffer."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise TypeError("the buffer is not contiguous")
    return memoryview(b"") if view.nbytes == 0 else view.cast("B")


@dataclass(slots=True)
class Handle:
    """An open file in a `HandleCache`."""

    fd: int
    users: int = 0


class HandleCache:
    """Open files by path, at most ``max_open`` idle or in use, from any thread.

    A checkpoint may have hundreds of shards and a process 1024 descriptors, so the least recently
    used idle file is closed. More than ``max_open`` are open only while more than that are in use
    at the same instant.
    """

    def __init__(self, flags: int, *, max_open: int = 32, fs: FileSystem = REAL) -> None:
        self._flags = flags
        self._max_open = self._limit = max_open
        self._fs = fs
        self._lock = threading.Lock()
        self._handles: OrderedDict[str, Handle] = OrderedDict()

    @contextmanager
    def use(self, path: str) -> Iterator[int]:
        """The descriptor of ``path``, which stays open for the length of the block."""
        with self._lock:
            self._limit = self._max_open
            handle = self._handles.get(path)
            if handle is None:
                fd = self._fs.open(path, self._flags)
                try:
                    self.opened(path, fd)
                except BaseException:
                    self._fs.close(fd)
                    raise
                handle = self._handles[path] = Handle(fd)
            self._handles.move_to_end(path)
            handle.users += 1
            self._shrink()
        try:
            yield handle.fd
        finally:
            with self._lock:
                handle.users -= 1
                self._shrink()

    def opened(self, path: str, fd: int) -> None:
        """Called for each file as it is opened; a subclass may refuse it by raising."""

    def __len__(self) -> int:
        return len(self._handles)

    def close(self) -> None:
        """Close all files, those in use as they are released. The cache can be used again."""
        with self._lock:
            self._limit = 0
            self._shrink()

    def _shrink(self) -> None:
        excess = len(self._handles) - self._limit
        if excess <= 0:
            return
        idle = [path for path, handle in self._handles.items() if handle.users == 0]
        for path in idle[:excess]:
            self._fs.close(self._handles.pop(path).fd)

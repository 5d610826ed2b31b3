"""Byte ranges of tensors in files that must not change while they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from magic_fast.errors import InternalError

from .fs import REAL, FileSystem, HandleCache, as_bytes
from .hashing import InputFile
from .header import LENGTH_BYTES, Header, header_length, parse_header
from .io_errors import reading
from .locate import refuse_foreign
from .messages import problem, shown
from .tensors import TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

PREFIX_BYTES = 64
_STOP = "Keep the inputs unchanged while they are read, then start again"


class FileReader:
    """Byte ranges of tensors, from any thread, over few open files.

    Any number of checkpoints may share one. A file whose header was read through this reader must
    still be the same file whenever it is opened again.

    Args:
        max_open: how many files stay open.
        fs: the file functions.
    """

    def __init__(self, *, max_open: int = 32, fs: FileSystem = REAL) -> None:
        self.fs = fs
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._handles = _CheckedHandles(self._seen, max_open=max_open, fs=fs)

    def read_into(
        self, info: TensorInfo, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """Read bytes ``start`` to ``start + nbytes`` of a tensor into the front of ``buffer``.

        Args:
            info: the tensor, its ``path`` openable.
            buffer: writable and contiguous, at least ``nbytes`` long.
            start: first byte, counted from the tensor's.
            nbytes: how many; None for all that follow ``start``.

        Returns:
            The number of bytes read, all that were asked for.

        Raises:
            CheckpointError: the file cannot be read, has changed, or ends too early.
            InternalError: the range leaves the tensor, or the buffer does not fit.
        """
        count = info.nbytes - start if nbytes is None else nbytes
        info.stop_of(start, count)
        view = as_bytes(buffer)
        if count and (view.readonly or len(view) < count):
            raise InternalError(
                f"Unusable buffer for {shown(info.name)}: expected {count} writable bytes, got "
                f"{len(view)} {'read-only' if view.readonly else 'writable'}. Please report this."
            )
        where = f"tensor {shown(info.name)} in {info.path}"
        with reading(where), self._handles.use(info.path) as fd:
            done = self.fs.read_exactly(fd, view[:count], info.offset + start)
        if done != count:
            raise problem(
                "File shrank while being read",
                where,
                f"{count} bytes at {info.offset + start}",
                f"{done}",
                _STOP,
            )
        return count

    def read_header(self, path: str) -> tuple[Header, InputFile]:
        """Read and check the header of one file, and remember the file's identity.

        Raises:
            CheckpointError: not a safetensors file, damaged, or unreadable.
        """
        with reading(path), self._handles.use(path) as fd:
            status = self.fs.stat(fd)
            prefix = bytearray(min(PREFIX_BYTES, status.st_size))
            del prefix[self.fs.read_exactly(fd, memoryview(prefix), 0) :]
            refuse_foreign(bytes(prefix), path)
            raw = bytearray(header_length(prefix, status.st_size, path))
            done = self.fs.read_exactly(fd, memoryview(raw), LENGTH_BYTES)
        if done != len(raw):
            raise problem(
                "File shrank while being read",
                path,
                f"{len(raw)} bytes of header",
                f"{done}",
                _STOP,
            )
        self._seen[path] = _identity(status)
        header = parse_header(bytes(raw), status.st_size, path)
        return header, InputFile(path, status.st_size, status.st_mtime_ns, header.header_hash)

    def close(self) -> None:
        """Close all files. Reading again opens them again."""
        self._handles.close()


class _CheckedHandles(HandleCache):
    """Open files for reading; one that was seen before must be the same still."""

    def __init__(
        self, seen: Mapping[str, tuple[int, int, int]], *, max_open: int, fs: FileSystem
    ) -> None:
        super().__init__(os.O_RDONLY, max_open=max_open, fs=fs)
        self._seen = seen

    def opened(self, path: str, fd: int) -> None:
        before = self._seen.get(path)
        if before is not None and _identity(self._fs.stat(fd)) != before:
            raise problem(
                "File changed while being read",
                path,
                "the file whose header was read",
                "another size, time or file",
                _STOP,
            )


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino

"""The system's errors, turned into ones that name the tensor and the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from magic_fast.errors import MagicFastError, OutputError

from .fs import NO_SPACE, FileSystem
from .messages import problem


@contextmanager
def reading(where: str) -> Iterator[None]:
    """`OSError` in the block becomes a `CheckpointError` about ``where``."""
    try:
        yield
    except MagicFastError:
        raise
    except OSError as error:
        raise problem(
            "Reading failed",
            where,
            "to read it",
            error.strerror or str(error),
            "Check that the file is still there and readable, and the disk sound",
        ) from error


@contextmanager
def writing(where: str, folder: str, fs: FileSystem, needed: int = 0) -> Iterator[None]:
    """`OSError` in the block becomes an `OutputError` about ``where``.

    That of a full disk says how many bytes are ``needed`` and how many free.
    """
    try:
        yield
    except MagicFastError:
        raise
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_full(where, folder, fs, needed) from error
        raise OutputError(
            f"Writing failed for {where}: expected to write it, got {error.strerror or error}. "
            "Check the disk and the permissions, then start again."
        ) from error


def disk_full(where: str, folder: str, fs: FileSystem, needed: int) -> OutputError:
    """The error for a disk without room for ``needed`` more bytes."""
    try:
        free = f"{fs.free_bytes(folder)} bytes free"
    except OSError:
        free = "an unknown number free"
    return OutputError(
        f"Disk full for {where}: expected room for {needed} bytes, got {free}. Free space, or "
        "choose another disk."
    )

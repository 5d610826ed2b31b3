"""Shard files that are there with their headers, filled in place: in any order, from any thread, by
any process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from magic_fast.errors import InternalError, OutputError

from .coverage import Coverage
from .fs import REAL, FileSystem, HandleCache, as_bytes
from .io_errors import reading, writing
from .messages import problem, shown
from .plan import ShardPlan
from .tensors import TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WORTH_STARTING = 1 << 20  # bytes; what is smaller waits for the end


class ShardFiles:
    """Shards under construction in one folder, as another process sees those of an `OutputFolder`.

    `write`, `read_into` and `mark_written` may be called from any thread.

    Args:
        path: the output that the shards belong to, for messages.
        folder: where they are while they are being made.
        fs: the file functions.

    Attributes:
        partial: ``folder``.
        shards: what `open_begun` opened, or `OutputFolder.create_shards` made.
    """

    def __init__(self, path: str, folder: str, fs: FileSystem = REAL) -> None:
        self.path, self.partial, self._fs = path, folder, fs
        self.shards: tuple[ShardPlan, ...] = ()
        self._handles = HandleCache(os.O_RDWR, fs=fs)
        self._infos: dict[str, TensorInfo] = {}
        self._done: dict[str, Coverage] = {}
        self._done_lock = threading.Lock()

    def open_begun(self, shards: Sequence[ShardPlan]) -> None:
        """Opens shards that another process created.

        Raises:
            OutputError: a shard is not there with this header and size.
        """
        for shard in shards:
            if not self._is_begun(shard):
                raise OutputError(
                    f"Shard not begun for {self.path}: expected {self.path_of(shard.file)} with "
                    "the header of the plan, got none of it. Run where the folder of the output "
                    "is seen."
                )
        self._expect(shards)

    def close(self) -> None:
        """Forces what was written to the disk and closes the files."""
        with self._writing(self.partial):
            self._handles.close()
        for shard in self.shards:
            with self._writing(self.path_of(shard.file)):
                self._fs.fsync_path(self.path_of(shard.file))

    def write(self, name: str, data: Buffer, start: int = 0) -> None:
        """Write bytes of a tensor, little-endian, from byte ``start`` of it on. Thread-safe.

        Ranges may come in any order, and again.

        Raises:
            OutputError: disk full or I/O error, naming tensor and file.
            InternalError: unknown tensor, or bytes outside it.
        """
        info = self._info(name)
        view = as_bytes(data)
        stop = info.stop_of(start, len(view))
        with (
            self._writing(self._where(info), len(view)),
            self._handles.use(self.path_of(info.path)) as fd,
        ):
            self._fs.write_exactly(fd, view, info.offset + start)
            if len(view) >= _WORTH_STARTING:  # little is left to do when all is forced to the disk
                self._fs.start_writing(fd, info.offset + start, len(view))
        with self._done_lock:
            self._done[name].add(start, stop)

    def read_into(self, name: str, buffer: Buffer, start: int = 0) -> None:
        """Fill ``buffer`` with what the partial output holds at byte ``start`` of a tensor."""
        info = self._info(name)
        view = as_bytes(buffer)
        info.stop_of(start, len(view))
        where = self._where(info)
        with reading(where), self._handles.use(self.path_of(info.path)) as fd:
            done = self._fs.read_exactly(fd, view, info.offset + start)
        if done != len(view):
            raise problem(
                "Shard too short",
                where,
                f"{len(view)} bytes at {info.offset + start}",
                f"{done}",
                "Start afresh, without resuming",
            )

    def mark_written(self, name: str, start: int = 0, nbytes: int | None = None) -> None:
        """Count bytes as written that another process or an earlier run wrote. Thread-safe."""
        info = self._info(name)
        stop = info.stop_of(start, info.nbytes - start if nbytes is None else nbytes)
        with self._done_lock:
            self._done[name].add(start, stop)

    def missing(self) -> dict[str, list[tuple[int, int]]]:
        """Tensor → byte ranges [start, stop) not written yet; empty when all are."""
        with self._done_lock:
            gaps = {
                name: self._done[name].missing(info.nbytes) for name, info in self._infos.items()
            }
        return {name: ranges for name, ranges in gaps.items() if ranges}

    def path_of(self, name: str) -> str:
        """Where a file of the output is while it is being made."""
        return os.path.join(self.partial, name)

    def _expect(self, shards: Sequence[ShardPlan]) -> None:
        self.shards = tuple(shards)
        self._infos = {info.name: info for shard in shards for info in shard.tensors}
        self._done = {name: Coverage() for name in self._infos}

    def _is_begun(self, plan: ShardPlan) -> bool:
        """Whether an earlier run made this shard: the same size and header."""
        path = self.path_of(plan.file)
        if (
            os.path.islink(path)
            or not os.path.isfile(path)
            or os.path.getsize(path) != plan.file_size
        ):
            return False
        head = bytearray(len(plan.header))
        with reading(path), self._handles.use(path) as fd:
            self._fs.read_exactly(fd, memoryview(head), 0)
        self._handles.close()
        return bytes(head) == plan.header

    @contextmanager
    def _writing(self, where: str, needed: int = 0) -> Iterator[None]:
        with writing(where, self.partial, self._fs, needed):
            yield

    def _where(self, info: TensorInfo) -> str:
        return f"tensor {shown(info.name)} in {self.path_of(info.path)}"

    def _info(self, name: str) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise InternalError(
                f"Unplanned tensor for {self.path}: expected one of {len(self._infos)} in the "
                f"plan, got {shown(name)}. Please report this."
            )
        return info

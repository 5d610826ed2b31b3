"""Writing a checkpoint in place, in any order, from any thread; it appears once, whole."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from magic_fast.errors import InternalError

from .coverage import Coverage
from .fs import REAL, FileSystem, HandleCache, as_bytes
from .io_errors import disk_full, reading, writing
from .locate import INDEX_NAME
from .messages import problem, shown
from .plan import ShardPlan, shard_index
from .small_files import SmallFiles
from .staging import Staging
from .tensors import TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self


_WORTH_STARTING = 1 << 20  # bytes; what is smaller waits for the end


class OutputFolder:
    """An output under construction in ``.OUT.partial/``, a sibling of OUT on the same file system.

    OUT is a folder, or one file where it ends in ``.safetensors``; then the plan has that one shard
    and there are no small files. Nothing appears under OUT before `finalise` renames all of it. As
    a context manager, leaving the block without `finalise`, by an exception or not, ends in
    `abort`. `write`, `read_into` and `mark_written` may be called from any thread.

    Args:
        path: OUT; must not exist, or be an empty folder. Missing parents are created.
        resume: keep what an earlier run left in the partial folder; else that is removed.
        resumable: on `abort` by the context manager, keep the partial folder.
        fs: the file functions.

    Attributes:
        path: OUT, absolute, links resolved.
        partial: the folder for anything else that belongs to the run, such as a journal. At the end
            whatever was neither written through this object nor named to `keep` is removed.
        is_file: OUT is a single file.
        resumed: an earlier run's partial folder was taken over.

    Raises:
        OutputError: OUT is in the way, another run writes it, or the folder cannot be made.

    Example:
        >>> import tempfile
        >>> from magic_fast.checkpoint import TensorSpec, open_checkpoint, plan_shards
        >>> out = tempfile.mkdtemp()
        >>> with OutputFolder(out) as output:
        ...     _ = output.create_shards(plan_shards([TensorSpec("w", "U8", (4,))]))
        ...     output.write("w", b"cd", start=2)
        ...     output.write("w", b"ab")
        ...     _ = output.finalise()
        >>> bytes(open_checkpoint(out).read("w"))
        b'abcd'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        resumable: bool = False,
        fs: FileSystem = REAL,
    ) -> None:
        self._staging = Staging(os.fspath(path), resume=resume, fs=fs)
        self.path = self._staging.path
        self.partial = self._staging.partial
        self.is_file = self._staging.is_file
        self.resumed = self._staging.resumed
        self._resumable = resumable
        self._fs = fs
        self._handles = HandleCache(os.O_RDWR, fs=fs)
        self._plans: tuple[ShardPlan, ...] = ()
        self._infos: dict[str, TensorInfo] = {}
        self._done: dict[str, Coverage] = {}
        self._done_lock = threading.Lock()
        self._small = SmallFiles(self.partial, self.is_file, fs)

    def create_shards(self, plans: Sequence[ShardPlan]) -> frozenset[str]:
        """Create all shards: room reserved, header written, data to come.

        Returns:
            The shards that an earlier run left with the same header and size; their data is as it
            was, and which of it is good is for the caller to say (`mark_written`). Empty unless
            resumed.

        Raises:
            OutputError: the disk is too small (says how much is needed and free), or an I/O error.
        """
        names = [plan.file for plan in plans]
        if self._plans or not names or (self.is_file and names != [os.path.basename(self.path)]):
            raise InternalError(
                f"Wrong shards for {self.path}: expected one plan made for this output, got "
                f"{names}. Please report this."
            )
        adopted = frozenset(p.file for p in plans if self.resumed and self._is_begun(p))
        new = [plan for plan in plans if plan.file not in adopted]
        with self._writing(self.partial):
            for plan in new:
                if os.path.lexists(self.path_of(plan.file)):
                    os.unlink(self.path_of(plan.file))
            needed = sum(plan.file_size for plan in new)
            if self._fs.free_bytes(self.partial) < needed:
                raise disk_full(self.path, self.partial, self._fs, needed)
        for plan in new:
            with self._writing(self.path_of(plan.file), plan.file_size):
                with self._fs.new_file(self.path_of(plan.file)) as fd:
                    self._fs.preallocate(fd, plan.file_size)
                    self._fs.write_exactly(fd, memoryview(plan.header), 0)
        self._plans = tuple(plans)
        self._infos = {info.name: info for plan in plans for info in plan.tensors}
        self._done = {name: Coverage() for name in self._infos}
        return adopted

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

    def write_text(self, name: str, text: str) -> None:
        """Write a small file in UTF-8, replacing one of that name; a subfolder in it is made."""
        self._small.write_text(name, text)

    def copy_file(self, source: str | os.PathLike[str], name: str | None = None) -> None:
        """Copy a small file's content, following links; ``name`` in the output, or the same.

        Raises:
            CheckpointError: the source cannot be read.
            OutputError: the copy cannot be written.
        """
        self._small.copy(os.fspath(source), name)

    def path_of(self, name: str) -> str:
        """Where a file of the output is while it is being made."""
        return os.path.join(self.partial, name)

    def keep(self, name: str) -> None:
        """Let a file that the caller writes itself in `partial` be a part of the output.

        Raises:
            InternalError: the output is a single file, or the name is not one for a small file.
        """
        self._small.declare(name)

    def finalise(self) -> str:
        """Make the output appear, whole: all data to the disk, then the index, then one rename.

        Returns:
            OUT.

        Raises:
            InternalError: bytes that were never written.
            OutputError: an I/O error, or OUT came into being in the meantime. If only the very last
                step failed, forcing the rename to the disk, OUT is there.
        """
        gaps = self.missing()
        if gaps or not self._plans:
            name, ranges = next(iter(gaps.items()), ("any tensor", []))
            raise InternalError(
                f"Incomplete output for {self.path}: expected every byte of {len(self._infos)} "
                f"tensors, got gaps in {len(gaps)}, first {shown(name)} at {ranges[:3]}. Please "
                "report this."
            )
        with self._writing(self.partial):
            self._handles.close()
        declared = self._declared()
        for name in sorted(declared):
            with self._writing(self.path_of(name)):
                self._fs.fsync_path(self.path_of(name))
        if len(self._plans) > 1:
            self._write_index()
            declared.add(INDEX_NAME)
        with self._writing(self.partial):  # a journal last: until here it is of use
            for folder in self._small.remove_others(declared):
                self._fs.fsync_path(folder)
        self._staging.commit()
        return self.path

    def abort(self, *, keep: bool = False) -> None:
        """Give up: remove the partial folder, or ``keep`` it to resume. Again is harmless."""
        with suppress(OSError):  # what was not written is about to be removed or done again
            self._handles.close()
        self._staging.abandon(keep=keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort(keep=self._resumable)

    def _write_index(self) -> None:
        data = (json.dumps(shard_index(self._plans), indent=2, ensure_ascii=False) + "\n").encode()
        path = self.path_of(INDEX_NAME)
        with self._writing(path, len(data)), self._fs.new_file(path) as fd:
            self._fs.write_exactly(fd, memoryview(data), 0)
            self._fs.fsync(fd)

    def _declared(self) -> set[str]:
        return self._small.names | {plan.file for plan in self._plans}

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

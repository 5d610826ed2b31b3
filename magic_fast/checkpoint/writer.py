"""Writing a checkpoint in place, in any order, from any thread; it appears once, whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from magic_fast.errors import InternalError

from .fs import COPY_BLOCK_BYTES, REAL, FileSystem
from .io_errors import disk_full, reading
from .messages import shown
from .plan import ShardPlan, index_name, shard_index
from .shard_files import ShardFiles
from .staging import Staging

if TYPE_CHECKING:
    from typing_extensions import Self


class OutputFolder(ShardFiles):
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
        super().__init__(self._staging.path, self._staging.partial, fs)
        self.is_file = self._staging.is_file
        self.resumed = self._staging.resumed
        self._resumable = resumable
        self._small: set[str] = set()

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
        if self.shards or not names or (self.is_file and names != [os.path.basename(self.path)]):
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
        self._expect(plans)
        return adopted

    def write_text(self, name: str, text: str) -> None:
        """Write a small file in UTF-8, replacing one of that name; a subfolder in it is made."""
        path, data = self.keep(name), text.encode()
        with self._writing(path, len(data)), self._fs.new_file(path) as fd:
            self._fs.write_exactly(fd, memoryview(data), 0)

    def copy_file(self, source: str | os.PathLike[str], name: str | None = None) -> None:
        """Copy a small file's content, following links; ``name`` in the output, or the same.

        Raises:
            CheckpointError: the source cannot be read.
            OutputError: the copy cannot be written.
        """
        source = os.fspath(source)
        block = memoryview(bytearray(COPY_BLOCK_BYTES))
        with reading(source):
            origin = self._fs.open(source, os.O_RDONLY)
        try:
            path = self.keep(os.path.basename(source) if name is None else name)
            needed = self._fs.stat(origin).st_size
            with self._writing(path, needed), self._fs.new_file(path) as fd:
                offset = 0
                while True:
                    with reading(source):
                        count = self._fs.read_exactly(origin, block, offset)
                    if count == 0:
                        break
                    self._fs.write_exactly(fd, block[:count], offset)
                    offset += count
        finally:
            self._fs.close(origin)

    def keep(self, name: str) -> str:
        """Let a small file that the caller writes itself in `partial` be a part of the output.

        Returns:
            Its path, whose folder exists.

        Raises:
            InternalError: the output is a single file, or the name is not one for a small file.
        """
        taken = name.endswith((".safetensors", ".safetensors.index.json"))
        if self.is_file or taken or {"", ".", ".."} & {*name.split("/")}:
            raise InternalError(
                f"Wrong small file for {self.partial}: expected a relative name beside the shards "
                f"of a folder, got {shown(name)}. Please report this."
            )
        path = self.path_of(name)
        with self._writing(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        self._small.add(name)
        return path

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
        if gaps or not self.shards:
            name, ranges = next(iter(gaps.items()), ("any tensor", []))
            raise InternalError(
                f"Incomplete output for {self.path}: expected every byte of {len(self._infos)} "
                f"tensors, got gaps in {len(gaps)}, first {shown(name)} at {ranges[:3]}. Please "
                "report this."
            )
        with self._writing(self.partial):
            self._handles.close()
        declared = self._small | {plan.file for plan in self.shards}
        for name in sorted(declared):
            with self._writing(self.path_of(name)):
                self._fs.fsync_path(self.path_of(name))
        if len(self.shards) > 1:
            self._write_index()
            declared.add(index_name(self.shards[0].file))
        with self._writing(self.partial):  # a journal last: until here it is of use
            for folder in self._remove_others(declared):
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

    def __exit__(self, *error: object) -> None:
        self.abort(keep=self._resumable)

    def _write_index(self) -> None:
        data = (json.dumps(shard_index(self.shards), indent=2, ensure_ascii=False) + "\n").encode()
        path = self.path_of(index_name(self.shards[0].file))
        with self._writing(path, len(data)), self._fs.new_file(path) as fd:
            self._fs.write_exactly(fd, memoryview(data), 0)
            self._fs.fsync(fd)

    def _remove_others(self, declared: set[str]) -> list[str]:
        """Remove what is not declared; returns the folders left, innermost first."""
        folders: list[str] = []
        for folder, subfolders, names in os.walk(self.partial, topdown=False):
            links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
            for name in names + links:
                path = os.path.join(folder, name)
                if os.path.relpath(path, self.partial) not in declared:
                    os.unlink(path)
            if os.listdir(folder):
                folders.append(folder)
            else:
                os.rmdir(folder)
        return folders

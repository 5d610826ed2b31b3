"""The files of an output that are not shards, and what of the rest must go."""

from __future__ import annotations

import os

from magic_fast.errors import InternalError

from .fs import COPY_BLOCK_BYTES, FileSystem
from .io_errors import reading, writing
from .messages import shown


class SmallFiles:
    """Small files in ``folder``; ``names`` are those that belong to the result.

    Args:
        folder: the partial folder.
        forbidden: the output is a single file, with no room for others.
        fs: the file functions.
    """

    def __init__(self, folder: str, forbidden: bool, fs: FileSystem) -> None:
        self.names: set[str] = set()
        self._folder = folder
        self._forbidden = forbidden
        self._fs = fs

    def declare(self, name: str) -> str:
        """Let a file be a part of the result; returns its path, whose folder exists."""
        taken = name.endswith((".safetensors", ".safetensors.index.json"))
        if self._forbidden or taken or {"", ".", ".."} & {*name.split("/")}:
            raise InternalError(
                f"Wrong small file for {self._folder}: expected a relative name beside the shards "
                f"of a folder, got {shown(name)}. Please report this."
            )
        path = os.path.join(self._folder, name)
        with writing(path, self._folder, self._fs):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        self.names.add(name)
        return path

    def write_text(self, name: str, text: str) -> None:
        """Write UTF-8, replacing a file of that name."""
        path, data = self.declare(name), text.encode()
        with writing(path, self._folder, self._fs, len(data)), self._fs.new_file(path) as fd:
            self._fs.write_exactly(fd, memoryview(data), 0)

    def copy(self, source: str, name: str | None) -> None:
        """Copy a file's content, following links."""
        block = memoryview(bytearray(COPY_BLOCK_BYTES))
        with reading(source):
            origin = self._fs.open(source, os.O_RDONLY)
        try:
            path = self.declare(os.path.basename(source) if name is None else name)
            needed = self._fs.stat(origin).st_size
            with writing(path, self._folder, self._fs, needed), self._fs.new_file(path) as fd:
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

    def remove_others(self, declared: set[str]) -> list[str]:
        """Remove what is not declared; returns the folders left, innermost first."""
        folders: list[str] = []
        for folder, subfolders, names in os.walk(self._folder, topdown=False):
            links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
            for name in names + links:
                path = os.path.join(folder, name)
                if os.path.relpath(path, self._folder) not in declared:
                    os.unlink(path)
            if os.listdir(folder):
                folders.append(folder)
            else:
                os.rmdir(folder)
        return folders

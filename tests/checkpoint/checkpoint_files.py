"""Small checkpoints on disk, well formed by the safetensors library or damaged by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from magic_fast.checkpoint import FileSystem

LIBRARY_DTYPES = ("BOOL", "U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32", "F64", "I64", "U64")


def raw_file(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A file from a header that nobody checked."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """One entry of a header, by default right for four bytes."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_sharded(
    folder: Path, shards: list[dict[str, np.ndarray]], config: dict[str, Any] | None = None
) -> Path:
    """A model folder with an index, written by the library."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config if config is not None else {}))
    return folder


def two_shards(folder: Path) -> Path:
    """Tensors ``a``, ``b`` and ``c`` in two shards."""
    return write_sharded(
        folder,
        [
            {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.int64)},
            {"c": np.array(7, dtype=np.float16)},
        ],
        {"tie_word_embeddings": False},
    )


class Faults(FileSystem):
    """The real functions, until a test says which call fails, and how far reads and writes get."""

    def __init__(self) -> None:
        self.fail: dict[str, OSError] = {}
        self.at_most: int | None = None
        self.free: int | None = None
        self.calls: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}

    def _step(self, name: str, path: str) -> None:
        self.calls.append((name, os.path.basename(path)))
        error = self.fail.get(f"{name} {os.path.basename(path)}", self.fail.get(name))
        if error is not None:
            raise error

    def open(self, path: str, flags: int) -> int:
        self._step("open", path)
        fd = super().open(path, flags)
        self._paths[fd] = path
        return fd

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        self._step("pread", self._paths[fd])
        return super().pread(fd, buffer[: self.at_most], offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self._step("pwrite", self._paths[fd])
        return super().pwrite(fd, data[: self.at_most], offset)

    def allocate(self, fd: int, nbytes: int) -> None:
        self._step("allocate", self._paths[fd])
        super().allocate(fd, nbytes)

    def fsync(self, fd: int) -> None:
        self._step("fsync", self._paths[fd])
        super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        self._step("rename", target)
        super().rename(source, target)

    def free_bytes(self, path: str) -> int:
        return super().free_bytes(path) if self.free is None else self.free

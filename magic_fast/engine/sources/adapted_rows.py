"""Rows of W + s·B·A, made block by block."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from magic_fast.adapters import AdapterModule
from magic_fast.checkpoint import TensorInfo
from magic_fast.engine.plan.units import element_size

_BLOCK = 1 << 16  # elements made at a time: they stay in the second cache
_READERS = 2  # threads that read at the same time


@dataclass(frozen=True)
class Change:
    """How a stored tensor changes, in its own layout [rows, cols].

    LoRA adds left·right, which are B and A, or, ``transposed`` (embeddings, and weights that are
    stored [in, out]), Aᵀ and Bᵀ.
    """

    stored: TensorInfo
    module: AdapterModule
    up: TensorInfo
    transposed: bool

    @property
    def rows(self) -> int:
        return self.stored.shape[0]

    @property
    def cols(self) -> int:
        return prod(self.stored.shape[1:])

    @property
    def block_rows(self) -> int:
        return max(1, _BLOCK // max(1, self.cols))

    @property
    def memory(self) -> int:
        """Bytes that reading takes: the right factor and its bytes as they are stored, and for each
        reader three blocks."""
        size = 8 if self.stored.dtype == "F64" else 4
        if self.module.form is not None:  # weight, change, and what making it takes
            return 4 * size * prod(self.stored.shape)
        rank, block = self.module.rank, self.block_rows
        return size * (2 * rank * self.cols + _READERS * block * (3 * self.cols + 2 * rank))


class Source(Protocol):
    """Where the bytes come from."""

    def read_base(self, change: Change, start: int, data: memoryview) -> None:
        """Bytes of the stored tensor."""

    def read_factor(self, info: TensorInfo, start: int, data: memoryview) -> None:
        """Bytes of a factor."""


def right_factor(change: Change, dtype: str, source: Source) -> Any:
    """The right factor [r, cols] as an array of ``dtype``."""
    import numpy as np

    rank = change.module.rank
    if change.transposed:
        stored = numbers(change.up, dtype, source).reshape(change.cols, rank)
        return np.ascontiguousarray(stored.T)
    return numbers(change.module.down, dtype, source).reshape(rank, change.cols)


class RowMaker:
    """Makes rows of a changed tensor: w + Σ_j fl(s·l_j)·r_j, added in the order of j in the
    result's dtype, every operation rounded by itself. So the bits hang on nothing else: not on
    where a read begins, and on no library's idea of how to multiply matrices.

    Args:
        change: of which tensor.
        dtype: of the result, F32 or F64.
        first, last: rows that will be asked for.
        right: the right factor.
        source: where bytes come from.
    """

    def __init__(
        self, change: Change, dtype: str, first: int, last: int, right: Any, source: Source
    ) -> None:
        import numpy as np

        self._change, self._right, self._source, self._first = change, right, source, first
        rank, down = change.module.rank, change.module.down
        if change.transposed:  # columns of A [r, rows]
            starts = range(first, rank * change.rows, change.rows)
            parts = [numbers(down, dtype, source, s, s + last - first) for s in starts]
            left = np.stack(parts, axis=1)
        else:
            left = numbers(change.up, dtype, source, first * rank, last * rank)
        self._wide = _WIDE[dtype]
        self._left = left.reshape(-1, rank) * np.dtype(self._wide).type(change.module.scaling)
        shape = (change.block_rows, change.cols)
        self._scratch = np.empty(shape, self._wide)
        size = element_size(change.stored.dtype)
        self._bytes = bytearray(shape[0] * shape[1] * size)

    def make(self, row: int, stop: int, out: memoryview) -> None:
        """Rows [row, stop), at most a block, into ``out``."""
        import numpy as np

        cols = self._change.cols
        result = np.frombuffer(out, self._wide).reshape(stop - row, cols)
        left = self._left[row - self._first : stop - self._first]
        scratch = self._scratch[: stop - row]
        result.fill(0)
        for j, right in enumerate(self._right):
            np.multiply(left[:, j, None], right, out=scratch)
            result += scratch
        size = cols * element_size(self._change.stored.dtype)
        data = memoryview(self._bytes)[: (stop - row) * size]
        self._source.read_base(self._change, row * size, data)
        widen(data, self._change.stored.dtype, scratch)
        result += scratch


_WIDE = {"F32": "<f4", "F64": "<f8"}
_KINDS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


def widen(data: memoryview | bytearray, dtype: str, out: Any) -> None:
    """Stored little-endian floats into an array of a type at least as wide."""
    import numpy as np

    stored = np.frombuffer(data, _KINDS[dtype]).reshape(out.shape)
    if dtype != "BF16":
        np.copyto(out, stored)
    elif out.dtype.itemsize == 4:
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, (stored.astype(np.uint32) << 16).view(np.float32))


def numbers(
    info: TensorInfo, dtype: str, source: Source, start: int = 0, stop: int | None = None
) -> Any:
    """Elements of a factor as an array of ``dtype``."""
    import numpy as np

    size = element_size(info.dtype)
    count = (prod(info.shape) if stop is None else stop) - start
    data = bytearray(count * size)
    source.read_factor(info, start * size, memoryview(data))
    out = np.empty(count, _WIDE[dtype])
    widen(data, info.dtype, out)
    return out

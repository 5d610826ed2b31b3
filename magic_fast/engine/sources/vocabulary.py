"""Embeddings of several vocabularies in the rows of one: read so, never stored so."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from magic_fast.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Where a row comes from: rows of models, averaged; no row for zeros.
Row = tuple[tuple[str, int], ...]

_BLOCK = 256  # rows held while a mean is taken
_NAMES = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|lm_head|embed_out)"
    r"\.(weight|bias)$|^output\.weight$"
)


def vocabulary_tensors(model: Checkpoint) -> dict[str, TensorInfo]:
    """The stored tensors with one row per token, by their names."""
    return {
        name: info for name, info in model.tensors.items() if _NAMES.search(name) and info.shape
    }


class AlignedCheckpoint(Checkpoint):
    """A checkpoint whose embeddings have the rows of another vocabulary.

    Reads of those tensors are put together from rows of this model and of others (rounded to this
    model's dtype where theirs is another, averages once); all else is read as it is stored.

    Args:
        own: the checkpoint.
        rows: what each row of the new embeddings is; None for the mean of all others.
        models: those that ``rows`` names, as they are stored.
    """

    def __init__(
        self, own: Checkpoint, rows: Sequence[Row | None], models: Mapping[str, Checkpoint]
    ) -> None:
        vars(self).update(vars(own))
        self._own = own
        self._rows = tuple(rows)
        self._models = {name: models[name] for name in {r[0] for row in rows for r in row or ()}}
        self._stored = dict(own.tensors)
        for name, info in vocabulary_tensors(own).items():
            shape = (len(rows), *info.shape[1:])
            size = info.nbytes // info.shape[0] if info.shape[0] else 0
            self._stored[name] = replace(info, shape=shape, nbytes=len(rows) * size)
        self.tensors = MappingProxyType(self._stored)
        self._aligned = frozenset(vocabulary_tensors(own))
        self._means: dict[str, bytes] = {}
        self._starts = _run_starts(self._rows)

    def read_into(
        self, name: str, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """As of `Checkpoint`, the rows of the new vocabulary."""
        info = self.resolve(name)
        if info.name not in self._aligned:
            return self._own.read_into(name, buffer, start, nbytes)
        view = memoryview(buffer).cast("B")
        count = info.nbytes - start if nbytes is None else nbytes
        size = info.nbytes // len(self._rows)
        done = 0
        while done < count:
            row, skip = divmod(start + done, size)
            run = bisect_right(self._starts, row)
            stop = self._starts[run] if run < len(self._starts) else len(self._rows)
            length = min(count - done, (stop - row) * size - skip)
            self._read_run(info, row, skip, view[done : done + length])
            done += length
        return count

    def _read_run(self, info: TensorInfo, row: int, skip: int, view: memoryview) -> None:
        """Bytes of one run of rows, from byte ``skip`` of its row ``row`` on."""
        sources = self._rows[row]
        if sources is not None and len(sources) == 1:
            model, place = sources[0]
            stored = self._models[model].resolve(info.name)
            if stored.dtype == info.dtype:
                size = stored.nbytes // stored.shape[0]
                self._models[model].read_into(info.name, view, place * size + skip, len(view))
                return
        size = info.nbytes // len(self._rows)
        last = row + -(-(skip + len(view)) // size)
        data = b"".join(self._made(info, r) for r in range(row, last))
        view[:] = data[skip : skip + len(view)]

    def _made(self, info: TensorInfo, row: int) -> bytes:
        """A row that is zero, rounded from another dtype, or an average."""
        import torch

        from magic_fast.engine.execute.whole import DTYPES, as_bytes

        sources = self._rows[row]
        if sources is None:
            if info.name not in self._means:
                self._means[info.name] = self._mean(info)
            return self._means[info.name]
        if not sources:
            return bytes(info.nbytes // len(self._rows))
        total: Any = 0
        for model, place in sources:
            stored = self._models[model].resolve(info.name)
            size = stored.nbytes // stored.shape[0]
            data = bytearray(size)
            self._models[model].read_into(info.name, data, place * size, size)
            total = total + torch.frombuffer(data, dtype=DTYPES[stored.dtype]).double()
        return bytes(as_bytes((total / len(sources)).to(DTYPES[info.dtype])))

    def _mean(self, info: TensorInfo) -> bytes:
        """The mean of all rows that are no mean, in blocks of rows."""
        import torch

        from magic_fast.engine.execute.whole import DTYPES, as_bytes

        count = next(i for i, row in enumerate(self._rows) if row is None)
        size = info.nbytes // len(self._rows)
        total: Any = 0
        for first in range(0, count, _BLOCK):
            rows = min(_BLOCK, count - first)
            data = bytearray(rows * size)
            self.read_into(info.name, data, first * size, len(data))
            block = torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(rows, -1)
            total = total + block.double().sum(0)
        return bytes(as_bytes((total / count).to(DTYPES[info.dtype])))

    def close(self) -> None:
        """Close the files of all models that rows come from."""
        self._own.close()
        for model in self._models.values():
            model.close()

    def opener(self) -> Callable[[], Checkpoint]:
        """What opens it again, in another process too."""
        openers = {name: model.opener() for name, model in self._models.items()}
        return partial(_open_aligned, self._own.opener(), self._rows, openers)


def _open_aligned(
    own: Callable[[], Checkpoint],
    rows: Sequence[Row | None],
    openers: Mapping[str, Callable[[], Checkpoint]],
) -> Checkpoint:
    models = {name: opener() for name, opener in openers.items()}
    return AlignedCheckpoint(own(), rows, models)


def _run_starts(rows: Sequence[Row | None]) -> list[int]:
    """First rows of the runs that lie together where they are stored, or are all the mean."""
    return [i for i in range(len(rows)) if i == 0 or not _follows(rows[i - 1], rows[i])]


def _follows(before: Row | None, row: Row | None) -> bool:
    if before is None or row is None:
        return before is row
    return len(before) == len(row) == 1 and row[0] == (before[0][0], before[0][1] + 1)

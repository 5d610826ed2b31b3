"""Tensors of several vocabularies in the order of one: read so, never stored so."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from magic_fast.checkpoint import Checkpoint, TensorInfo
from magic_fast.models.lookup import text_parts

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Where a row comes from: rows of models, averaged; no row for zeros.
Row = tuple[tuple[str, int], ...]

_BLOCK = 256  # rows held while a mean is taken


def vocabulary_axes(model: Checkpoint) -> dict[str, int]:
    """Name → axis whose places are the words of the tokenizer, of the stored tensors that have one.
    Vocabularies of other parts of a model, of sounds and images, are none.

    Raises:
        InputError: a tensor that may have such an axis, and no role tells.
    """
    sizes = {
        size
        for part in text_parts(model.config)
        for key, size in part.items()
        if key.startswith("vocab_size") and isinstance(size, int)
    }
    axes = {
        name: axis
        for name in model.tensors
        if (axis := model.roles.vocabulary_axis(name)) is not None
    }
    fitting = {n: axis for n, axis in axes.items() if model.tensors[n].shape[axis] in sizes}
    return fitting or axes  # a configuration need not know of embeddings that were resized


class _Words(NamedTuple):
    """How a tensor's words lie: ``groups`` of ``places`` of them, ``nbytes`` each."""

    groups: int
    places: int
    nbytes: int

    @classmethod
    def of(cls, info: TensorInfo, axis: int) -> _Words:
        outer, count = prod(info.shape[:axis]), info.shape[axis]
        return cls(outer, count, info.nbytes // (outer * count) if outer * count else 0)


class AlignedCheckpoint(Checkpoint):
    """A checkpoint whose embeddings, heads and their biases have the words of another vocabulary.

    Reads of those tensors are put together from words of this model and of others (rounded to this
    model's dtype where theirs is another, averages once); all else is read as it is stored. A word
    is a row, or what lies at its place along another axis.

    Args:
        own: the checkpoint.
        rows: what each word of the new vocabulary is; None for the mean of all others.
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
        self._axes = vocabulary_axes(own)
        for name, axis in self._axes.items():
            info, words = own.tensors[name], _Words.of(own.tensors[name], axis)
            shape = (*info.shape[:axis], len(rows), *info.shape[axis + 1 :])
            self._stored[name] = replace(
                info, shape=shape, nbytes=words.groups * len(rows) * words.nbytes
            )
        self.tensors = MappingProxyType(self._stored)
        self._means: dict[tuple[str, int], bytes] = {}
        self._starts = _run_starts(self._rows)

    def read_into(
        self, name: str, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """As of `Checkpoint`, the rows of the new vocabulary."""
        info = self.resolve(name)
        if info.name not in self._axes:
            return self._own.read_into(name, buffer, start, nbytes)
        view = memoryview(buffer).cast("B")
        count = info.nbytes - start if nbytes is None else nbytes
        size = _Words.of(info, self._axes[info.name]).nbytes
        done = 0
        while done < count:
            place, skip = divmod(start + done, size)
            group, row = divmod(place, len(self._rows))
            run = bisect_right(self._starts, row)
            stop = self._starts[run] if run < len(self._starts) else len(self._rows)
            length = min(count - done, (stop - row) * size - skip)
            self._read_run(info, group, row, skip, view[done : done + length])
            done += length
        return count

    def _at(self, model: str, info: TensorInfo, group: int, row: int) -> tuple[TensorInfo, int]:
        """A model's tensor of that name, and the offset of a word in it."""
        stored = self._models[model].resolve(info.name)
        words = _Words.of(stored, self._axes[info.name])
        return stored, (group * words.places + row) * words.nbytes

    def _read_run(
        self, info: TensorInfo, group: int, row: int, skip: int, view: memoryview
    ) -> None:
        """Bytes of one run of words, from byte ``skip`` of its word ``row`` on."""
        sources = self._rows[row]
        if sources is not None and len(sources) == 1:
            model, place = sources[0]
            stored, offset = self._at(model, info, group, place)
            if stored.dtype == info.dtype:
                self._models[model].read_into(info.name, view, offset + skip, len(view))
                return
        size = _Words.of(info, self._axes[info.name]).nbytes
        last = row + -(-(skip + len(view)) // size)
        data = b"".join(self._made(info, group, r) for r in range(row, last))
        view[:] = data[skip : skip + len(view)]

    def _made(self, info: TensorInfo, group: int, row: int) -> bytes:
        """A word that is zero, rounded from another dtype, or an average."""
        import torch

        from magic_fast.engine.execute.whole import DTYPES, as_bytes

        sources, size = self._rows[row], _Words.of(info, self._axes[info.name]).nbytes
        if sources is None:
            if (info.name, group) not in self._means:
                self._means[info.name, group] = self._mean(info, group)
            return self._means[info.name, group]
        if not sources:
            return bytes(size)
        total: Any = 0
        for model, place in sources:
            stored, offset = self._at(model, info, group, place)
            data = bytearray(_Words.of(stored, self._axes[info.name]).nbytes)
            self._models[model].read_into(info.name, data, offset, len(data))
            total = total + torch.frombuffer(data, dtype=DTYPES[stored.dtype]).double()
        return bytes(as_bytes((total / len(sources)).to(DTYPES[info.dtype])))

    def _mean(self, info: TensorInfo, group: int) -> bytes:
        """The mean of all words that are no mean, in blocks of them."""
        import torch

        from magic_fast.engine.execute.whole import DTYPES, as_bytes

        count = next(i for i, row in enumerate(self._rows) if row is None)
        size = _Words.of(info, self._axes[info.name]).nbytes
        start = group * len(self._rows)
        total: Any = 0
        for first in range(0, count, _BLOCK):
            rows = min(_BLOCK, count - first)
            data = bytearray(rows * size)
            self.read_into(info.name, data, (start + first) * size, len(data))
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

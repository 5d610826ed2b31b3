"""A model with an adapter on it, read as if it were a checkpoint: W + s·B·A is made as it is read,
and stored nowhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from magic_fast.adapters import Adapter, AdapterModule, open_adapter
from magic_fast.adapters.names import weight_names
from magic_fast.checkpoint import Checkpoint, TensorInfo
from magic_fast.engine.output.recheck import refuse_changed_files
from magic_fast.engine.plan.step import FLOATS
from magic_fast.engine.plan.units import element_size
from magic_fast.engine.sources.adapted_rows import Change, RowMaker, right_factor
from magic_fast.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with a LoRA adapter: the tensors it changes are read as W + s·B·A, those it
    trained whole from its own file, all others as stored.

    16-bit weights are widened, so that nothing is rounded before the merge: such a tensor is F32
    here, and `stored_dtype` says what it was.

    Args:
        own: the model.
        adapter: what was trained on it.

    Raises:
        CheckpointError: the adapter is no LoRA, or changes a module that the model does not have,
            or of another shape.
    """

    def __init__(self, own: Checkpoint, adapter: Adapter) -> None:
        vars(self).update(vars(own))
        if adapter.kind != "lora":
            raise CheckpointError(
                f"adapter for {adapter.path}: expected LoRA on a model of a full merge, got "
                f"{adapter.kind.upper()}. Merge it into its model first (PEFT's merge_and_unload), "
                "or merge the adapters by themselves."
            )
        self._own = own
        self._adapter = adapter
        self.files = (*own.files, *adapter.files)
        self._stored = dict(own.tensors)
        self._dtypes = dict(self._dtypes)
        self._changes = {
            change.stored.name: change
            for change in (_change_of(m, own, adapter) for m in adapter.modules.values())
        }
        for name, change in self._changes.items():
            self._dtypes[name] = own.stored_dtype(name)
            wide = "F64" if change.stored.dtype == "F64" else "F32"
            nbytes = prod(change.stored.shape) * element_size(wide)
            self._stored[name] = replace(change.stored, dtype=wide, nbytes=nbytes)
        self._whole = {_whole_name(name, own, adapter): key for name, key in adapter.whole.items()}
        for name, key in self._whole.items():
            self._stored[name] = replace(adapter.checkpoint.tensors[key], name=name)
        self.tensors = MappingProxyType(self._stored)
        self.overhead += max((c.memory for c in self._changes.values()), default=0)
        self._kept: tuple[Any, Any] = (None, None)

    def read_into(
        self, name: str, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """As of `Checkpoint`, with the adapter applied."""
        info = self.resolve(name)
        if info.name in self._whole:
            return self._adapter.checkpoint.read_into(self._whole[info.name], buffer, start, nbytes)
        change = self._changes.get(info.name)
        if change is None:
            return self._own.read_into(name, buffer, start, nbytes)
        count = info.nbytes - start if nbytes is None else nbytes
        view = memoryview(buffer).cast("B")[:count]
        if count:
            self._read_changed(change, info, view, start)
            refuse_changed_files(self._adapter.files)
        return count

    def _read_changed(self, change: Change, info: TensorInfo, view: memoryview, start: int) -> None:
        """Bytes of a changed tensor, in blocks of whole rows, straight into the view where a block
        is within it."""
        row_bytes = change.cols * element_size(info.dtype)
        first = start // row_bytes
        last = min(change.rows, -(-(start + len(view)) // row_bytes))
        maker = RowMaker(change, info.dtype, first, last, self._right(change, info.dtype), self)
        for row in range(first, last, change.block_rows):
            stop = min(row + change.block_rows, last)
            lead, nbytes = row * row_bytes - start, (stop - row) * row_bytes
            if lead >= 0 and lead + nbytes <= len(view):
                maker.make(row, stop, view[lead : lead + nbytes])
                continue
            data = memoryview(bytearray(nbytes))
            maker.make(row, stop, data)
            here = data[max(0, -lead) : len(view) - lead]
            view[max(0, lead) : max(0, lead) + len(here)] = here

    def _right(self, change: Change, dtype: str) -> Any:
        """The right factor of a tensor; that of the last one is kept, as it comes in pieces."""
        kept = self._kept
        if kept[0] is not change:
            kept = self._kept = (change, right_factor(change, dtype, self))
        return kept[1]

    def read_base(self, change: Change, start: int, data: memoryview) -> None:
        """Bytes of a tensor without the adapter."""
        self._own.read_into(change.stored.name, data, start, len(data))

    def read_factor(self, info: TensorInfo, start: int, data: memoryview) -> None:
        """Bytes of a factor."""
        self._adapter.checkpoint.read_into(info.name, data, start, len(data))

    def close(self) -> None:
        """Close the files of the model and of the adapter."""
        self._own.close()
        self._adapter.close()

    def opener(self) -> Callable[[], Checkpoint]:
        """What opens it again, in another process too."""
        return partial(open_adapted, self._own.opener(), self._adapter.path)


def open_adapted(
    opener: Callable[[], Checkpoint], adapter: str | os.PathLike[str]
) -> AdaptedCheckpoint:
    """The checkpoint that ``opener`` opens, with an adapter on it."""
    opened = open_adapter(os.path.abspath(os.path.expanduser(adapter)))
    try:
        own = opener()
        try:
            return AdaptedCheckpoint(own, opened)
        except BaseException:
            own.close()
            raise
    except BaseException:
        opened.close()
        raise


def _name_of(module: str, names: Iterable[str], own: Checkpoint, adapter: Adapter) -> str:
    """The one tensor of the model that a module of the adapter changes."""
    found = weight_names(module, adapter.style, names)
    if len(found) == 1:
        return found[0]
    got = "none of that name" if not found else f"{found[0]} and {found[1]}"
    raise CheckpointError(
        f"module '{module}' in {adapter.path}: expected its weight in {own.path}, got {got}. Name "
        "the model that the adapter was trained on."
    )


def _whole_name(name: str, own: Checkpoint, adapter: Adapter) -> str:
    """The stored tensor that one trained whole replaces."""
    if name in own:
        return own.resolve(name).name
    stem, _, leaf = name.rpartition(".")
    if leaf == "weight":
        return _name_of(stem, own.tensors, own, adapter)
    raise CheckpointError(
        f"tensor '{name}' in {adapter.path}: expected one of {own.path}, got none of that name. "
        "Name the model that the adapter was trained on."
    )


def _change_of(module: AdapterModule, own: Checkpoint, adapter: Adapter) -> Change:
    exact = f"{module.name}.weight"
    name = exact if exact in own else _name_of(module.name, own.tensors, own, adapter)
    stored = own.resolve(name)
    up = module.up
    assert up is not None  # of a LoRA
    for info in (stored, module.down, up):
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"dtype of '{info.name}' in {info.path}: expected {', '.join(FLOATS)}, got "
                f"{info.dtype}. Name the model whose weights are not quantised."
            )
    out, into = up.shape[0], module.down.shape[1:]
    plain = not module.embedding and (out, *into) == stored.shape
    turned = len(into) == 1 and (*into, out) == stored.shape
    if not (plain or turned):
        raise CheckpointError(
            f"module '{module.name}' in {adapter.path}: expected factors of {list(stored.shape)} "
            f"as in {own.path}, got {list(up.shape)} and {list(module.down.shape)}. Name the model "
            "that the adapter was trained on."
        )
    if plain and turned:  # square
        turned = bool(adapter.config.get("fan_in_fan_out"))
    return Change(stored, module, up, turned)

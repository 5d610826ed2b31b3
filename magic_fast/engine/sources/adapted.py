"""A model with an adapter on it, read as if it were a checkpoint: W + s·B·A is made as it is read,
and stored nowhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from magic_fast.adapters import Adapter, AdapterModule, open_adapter
from magic_fast.adapters.fitted import fitted, no_weight
from magic_fast.adapters.names import weight_names
from magic_fast.checkpoint import Checkpoint, TensorInfo
from magic_fast.checkpoint.reader import Resized
from magic_fast.checkpoint.tokenizer import TOKENIZER_NAME
from magic_fast.engine.output.recheck import refuse_changed_files
from magic_fast.engine.plan.step import FLOATS
from magic_fast.engine.plan.units import element_size
from magic_fast.engine.sources.adapted_forms import formed_change, formed_values
from magic_fast.engine.sources.adapted_rows import Change, RowMaker, right_factor
from magic_fast.engine.sources.tied import TiedCheckpoint
from magic_fast.errors import CheckpointError
from magic_fast.models import Kind, Source, roles_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LAYER = re.compile(r"[^.]+\.\d+\..*$")


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
        adapter, notes = fitted(adapter, own)
        places = _Places(own, adapter)
        self.notes = (*own.notes, *notes)
        self._own = own = places.own
        vars(self).update(tensors=own.tensors, aliases=own.aliases)
        vars(self).pop("roles", None)  # of other names, where ties are opened
        self._adapter = adapter
        self.files = (*own.files, *adapter.files)
        self._stored = dict(own.tensors)
        self._dtypes = dict(self._dtypes)
        self._whole = {places.of(name): key for name, key in adapter.whole.items()}
        for name, key in self._whole.items():
            self._stored[name] = replace(adapter.checkpoint.tensors[key], name=name)
        self._changes: dict[str, Change] = {}
        for module in adapter.modules.values():
            name = module.weight or places.of_module(module)
            if name in self._changes:
                raise CheckpointError(
                    f"modules '{self._changes[name].module.name}' and '{module.name}' in "
                    f"{adapter.path}: expected one for each tensor of {own.path}, got both for "
                    f"'{name}'. Merge the adapter into its model first (PEFT's merge_and_unload)."
                )
            made = formed_change if module.form else _change_of
            change = self._changes[name] = made(module, self._stored[name], own, adapter)
            self._dtypes[name] = own.stored_dtype(name)
            wide = "F64" if change.stored.dtype == "F64" else "F32"
            nbytes = prod(change.stored.shape) * element_size(wide)
            self._stored[name] = replace(change.stored, dtype=wide, nbytes=nbytes)
        self.tensors = MappingProxyType(self._stored)
        self.resized = self._resized()
        self.changed: Mapping[str, Change] = self._changes  #: tensor → how it changes
        self.overhead += max((c.memory for c in self._changes.values()), default=0)
        self.overhead += adapter.checkpoint.overhead
        self._kept: tuple[Any, Any] = (None, None)

    def _resized(self) -> Resized | None:
        """The vocabulary that the adapter was trained with, where it is not the model's."""
        for name in self._whole:
            axis, before = self.roles[name].vocabulary, self._own.resolve(name).shape
            if axis is not None and (now := self._stored[name].shape) != before:
                self._check_words(name, now[axis], before[axis])
                path = self._adapter.path
                folder = path if os.path.isdir(path) else os.path.dirname(path)
                has_tokenizer = os.path.isfile(os.path.join(folder, TOKENIZER_NAME))
                return Resized(now[axis], folder if has_tokenizer else None)
        return None

    def _check_words(self, name: str, rows: int, before: int) -> None:
        """Refuses other tensors of words that kept the length of the model's vocabulary."""
        for other, info in self._stored.items():
            axis = self.roles[other].vocabulary
            if axis is not None and info.shape[axis] == before:
                raise CheckpointError(
                    f"vocabulary of {self._adapter.path}: expected {rows} words as in '{name}', "
                    f"got {before} in '{other}', which the adapter does not have. Save it again "
                    "with that module among modules_to_save, or by its targets."
                )

    def read_into(
        self, name: str, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """As of `Checkpoint`, with the adapter applied."""
        info = self.resolve(name)
        change = self._changes.get(info.name)
        if change is None:
            return self._read_plain(info.name, buffer, start, nbytes)
        count = info.nbytes - start if nbytes is None else nbytes
        view = memoryview(buffer).cast("B")[:count]
        if count:
            self._read_changed(change, info, view, start)
            refuse_changed_files(self._adapter.files)
        return count

    def _read_plain(self, name: str, buffer: Buffer, start: int, nbytes: int | None) -> int:
        """Bytes of a tensor without its factors: as the adapter's file has it, which may be of
        another vocabulary, else the model's."""
        if name in self._whole:
            return self._adapter.checkpoint.read_into(self._whole[name], buffer, start, nbytes)
        return self._own.read_into(name, buffer, start, nbytes)

    def _read_changed(self, change: Change, info: TensorInfo, view: memoryview, start: int) -> None:
        """Bytes of a changed tensor, in blocks of whole rows, straight into the view where a block
        is within it."""
        if change.module.form is not None:
            view[:] = memoryview(self._right(change, info.dtype)).cast("B")[start:][: len(view)]
            return
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
        """The right factor, or the whole, of a tensor; the last one is kept for its next piece."""
        kept = self._kept
        if kept[0] is not change:
            make = right_factor if change.module.form is None else formed_values
            kept = self._kept = (change, make(change, dtype, self))
        return kept[1]

    def read_base(self, change: Change, start: int, data: memoryview) -> None:
        self._read_plain(change.stored.name, data, start, len(data))

    def read_factor(self, info: TensorInfo, start: int, data: memoryview) -> None:
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


class _Places:
    """The tensor of a model that each tensor of an adapter stands for.

    Attributes:
        own: the model, in which the tied weights that the adapter touches stand apart: what is
            trained on one of them is not the other's.
    """

    def __init__(self, own: Checkpoint, adapter: Adapter) -> None:
        self.own = own
        self._adapter = adapter
        known = [m.weight for m in adapter.modules.values() if m.weight]
        unsaid = (m for m in adapter.modules.values() if not m.weight)
        leaves = ((m.name, leaf) for m in unsaid for leaf in ("weight", m.leaf))
        names = [*adapter.whole, *dict.fromkeys(f"{name}.{leaf}" for name, leaf in leaves)]
        self._canonical = {role.canonical: name for name, role in own.roles.items()}
        asked = roles_of(own.config, {name: ((1, 1), "F32") for name in names})
        self._asked = {name: role.canonical for name, role in asked.items()}
        self._untie({*known, *map(self._found, names)} - {None})

    def of(self, name: str) -> str:
        """The stored name.

        Raises:
            CheckpointError: there is none, or no single one.
        """
        found = self._found(name)
        if found is None:
            raise no_weight(self._adapter, self.own, name)
        return found

    def of_module(self, module: AdapterModule) -> str:
        """The stored name of what a module changes: beside its weight, or itself."""
        name = f"{module.name}.{module.leaf}"
        weight = self._found(f"{module.name}.weight") or ""
        beside = weight.removesuffix("weight") + module.leaf if weight else name
        return beside if beside in self.own else self.of(name)

    def _found(self, name: str) -> str | None:
        """The name in the model: its own, the module tree's, else by how it ends."""
        if name in self.own:
            return name
        canonical = self._asked[name]
        known = self._canonical.get(canonical)
        if self.own.roles.source is Source.HEADERS and known is None:
            known = self._by_layer(name)
        if known is None and canonical in self.own:
            return canonical
        if known is not None and not self.own.roles[known].layout:
            return known
        stem, _, leaf = name.rpartition(".")
        near = weight_names(stem, self._adapter.style, self.own.tensors) if leaf == "weight" else []
        return near[0] if len(near) == 1 else None

    def _by_layer(self, name: str) -> str | None:
        """Of a model that is not known: the one tensor of that path from the layer's number on."""
        inside = _LAYER.search(name)
        near = [n for n in self.own.tensors if inside and n.endswith(f".{inside[0]}")]
        return near[0] if len(near) == 1 else None

    def _untie(self, touched: set[str | None]) -> None:
        """Gives the tied weights of which one is touched tensors of their own."""
        sources = {self.own.resolve(name).name for name in touched if name is not None}
        words = {n for n in sources if self.own.roles[n].kind is Kind.EMBEDDING}
        shown = {alias: name for alias, name in self.own.aliases.items() if name in words}
        if shown:
            self.own = TiedCheckpoint(self.own, {}, shown)


def _change_of(
    module: AdapterModule, stored: TensorInfo, own: Checkpoint, adapter: Adapter
) -> Change:
    up = module.up
    assert up is not None  # of a LoRA
    quantised = own.quantisation
    for info in (stored, module.down, up):
        coded = info is stored and quantised is not None and stored.name in quantised.codes
        if info.dtype not in FLOATS or coded:
            got = f"{quantised.scheme} codes" if coded and quantised is not None else info.dtype
            raise CheckpointError(
                f"dtype of '{info.name}' in {info.path}: expected {', '.join(FLOATS)}, got "
                f"{got}. Name the model whose weights are not quantised."
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
    if plain and turned:  # square: by the class of the module, else by the configuration
        role = own.roles[stored.name]
        turned = role.units == (1,) if role.owner else bool(adapter.config.get("fan_in_fan_out"))
    return Change(stored, module, up, turned)

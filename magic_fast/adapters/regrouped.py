"""An adapter of a diffusion model in the names of another convention, where one tensor may be rows
of another: fused q, k and v are rows of one, the halves of a modulation change places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from magic_fast.adapters.opening import Adapter, AdapterModule
from magic_fast.checkpoint import Checkpoint, TensorInfo
from magic_fast.checkpoint.tensors import DTYPE_BITS
from magic_fast.errors import CheckpointError
from magic_fast.models.diffusion import Link, Meaning, Naming

if TYPE_CHECKING:
    from typing_extensions import Buffer

_KINDS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


class Bit(NamedTuple):
    """What a module is to a tensor of the other convention.

    Attributes:
        module: of the adapter.
        link: diffusers' parameter and the original tensor.
        to: whose names the tensor has; None where they are those of the module, too.
    """

    module: AdapterModule
    link: Link
    to: Naming | None

    @property
    def cuts(self) -> bool:
        """Whether only rows of one are rows of the other."""
        return self.to is not None and self.link.rows is not None

    @property
    def turns(self) -> bool:
        """Whether one is the transpose of the other."""
        return self.to is not None and self.link.turned

    @property
    def told(self) -> tuple[object, ...]:
        """What tells it from that of another family."""
        return self.module.name, self.turns, self.cuts and (self.to, self.link.rows)


def bits_of(module: AdapterModule, meaning: Meaning, to: Naming) -> dict[str, Bit]:
    """Parameter in the names of ``to``, without prefix → what a module is to it."""
    if to is meaning.naming:
        return {meaning.links[0].names[to]: Bit(module, meaning.links[0], None)}
    return {link.names[to]: Bit(module, link, to) for link in meaning.links}


class Blocks(NamedTuple):
    """A tensor that is made of parts of others, zero elsewhere: each of them, which of its rows,
    row and column where they begin, and a factor or None."""

    info: TensorInfo
    parts: tuple[tuple[TensorInfo, tuple[int, int], int, int, float | None], ...]


class BlockCheckpoint(Checkpoint):
    """An adapter's weights with more tensors, made of blocks of those that are stored as they are
    read."""

    def __init__(self, own: Checkpoint, made: Iterable[Blocks]) -> None:
        vars(self).update(vars(own))
        self._own = own
        self._made = {one.info.name: one for one in made}
        self._stored = {**own.tensors, **{name: one.info for name, one in self._made.items()}}
        self.tensors = MappingProxyType(self._stored)
        self.overhead = 2 * max((one.info.nbytes for one in self._made.values()), default=0)
        self._kept: tuple[str, memoryview] = ("", memoryview(b""))

    def read_into(
        self, name: str, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """As of `Checkpoint`; the tensor that was made last is kept, as it comes in pieces."""
        if name not in self._made:
            return self._own.read_into(name, buffer, start, nbytes)
        kept = self._kept
        if kept[0] != name:
            kept = self._kept = (name, memoryview(self._bytes(self._made[name])))
        count = self._made[name].info.nbytes - start if nbytes is None else nbytes
        memoryview(buffer).cast("B")[:count] = kept[1][start : start + count]
        return count

    def _bytes(self, blocks: Blocks) -> bytes:
        import numpy as np

        info = blocks.info
        made = np.zeros((info.shape[0], prod(info.shape[1:])), _KINDS[info.dtype])
        for source, (first, last), row, col, factor in blocks.parts:
            x = np.frombuffer(self._own.read(source.name), _KINDS[source.dtype])
            x = x.reshape(source.shape[0], -1)[first:last]
            if source.dtype != info.dtype:
                if source.dtype == "BF16":
                    x = (x.astype("<u4") << 16).view("<f4")
                x = x.astype(made.dtype)
            if factor is not None:
                x = x * made.dtype.type(factor)
            made[row : row + len(x), col : col + x.shape[1]] = x
        return made.tobytes()


def regrouped(
    adapter: Adapter,
    groups: Mapping[str, Sequence[Bit]],
    keys: Callable[[str], tuple[str, str]],
    only_cut: bool,
) -> tuple[list[AdapterModule], Checkpoint]:
    """The modules of an adapter for other tensors, and the weights that hold their factors.

    Args:
        groups: name of each new module → what it consists of.
        keys: name of a new module → keys of its factors.
        only_cut: modules that are one as they are keep their keys.

    Raises:
        CheckpointError: two modules for one tensor, or rows that do not come out even.
    """
    modules, made = [], []
    for name, bits in groups.items():
        first = bits[0].module
        kept = len(bits) == 1 and only_cut and not bits[0].cuts
        if not (kept and not bits[0].turns):
            _refuse_forms(adapter, name, bits)
        if kept:
            modules.append(_turned(first, bits[0]))
            continue
        new, blocks = _module(adapter, name, bits, keys(name))
        modules.append(new)
        made += blocks
    return modules, BlockCheckpoint(adapter.checkpoint, made) if made else adapter.checkpoint


def _refuse_forms(adapter: Adapter, name: str, bits: Sequence[Bit]) -> None:
    """Refuses other forms than s·B·A where names of another convention take them apart."""
    form = next((bit.module.form for bit in bits if bit.module.form is not None), None)
    if form is not None:
        raise CheckpointError(
            f"module '{bits[0].module.name}' in {adapter.path}: expected A and B, which can be cut "
            f"and joined as the names of '{name}' ask, got {form.words}. Merge it into its model "
            "by the library that made it, and merge full models."
        )


def _turned(module: AdapterModule, bit: Bit) -> AdapterModule:
    return replace(module, embedding=module.embedding != bit.turns)


def _module(
    adapter: Adapter, name: str, bits: Sequence[Bit], keys: tuple[str, str]
) -> tuple[AdapterModule, list[Blocks]]:
    if len(bits) > 1 and not (
        all(b.cuts and b.to is Naming.ORIGINAL for b in bits) and apart(bits)
    ):
        raise CheckpointError(
            f"modules '{bits[0].module.name}' and '{bits[1].module.name}' in {adapter.path}: "
            f"expected one for each tensor of the model, got both for '{name}'. Save the adapter "
            "in one convention of names."
        )
    ups = [_up(bit.module) for bit in bits]
    scalings = {bit.module.scaling for bit in bits}
    scaled = len(scalings) > 1
    dtypes = {
        info.dtype for bit, up in zip(bits, ups, strict=True) for info in (bit.module.down, up)
    }
    dtype = dtypes.pop() if len(dtypes) == 1 and not scaled else "F64" if "F64" in dtypes else "F32"
    downs, parts, col, rows = [], [], 0, 0
    for bit, up in zip(bits, ups, strict=True):
        downs.append((bit.module.down, (0, bit.module.rank), col, 0, None))
        rows, spans = _spans(bit, up.shape[0], adapter)
        factor = bit.module.scaling if scaled else None
        parts += [(up, span, row, col, factor) for span, row in spans]
        col += bit.module.rank
    first = bits[0].module
    down = _info(keys[0], dtype, (col, *first.down.shape[1:]), adapter)
    up = _info(keys[1], dtype, (rows, col, *ups[0].shape[2:]), adapter)
    scaling = 1.0 if scaled else first.scaling
    embedding = _turned(first, bits[0]).embedding
    new = AdapterModule(name, down, up, scaling, embedding)
    return new, [Blocks(down, tuple(downs)), Blocks(up, tuple(parts))]


def apart(bits: Sequence[Bit]) -> bool:
    """Whether modules are for unlike rows of one tensor."""
    rows = [bit.link.rows[1] if bit.link.rows else () for bit in bits]
    places = [n for ranges in rows for start, stop in ranges for n in range(start, stop)]
    return len(set(places)) == len(places)


def _spans(bit: Bit, rows: int, adapter: Adapter) -> tuple[int, list[tuple[tuple[int, int], int]]]:
    """How many rows the new B has, and which of the module's stand where in it."""
    if not bit.cuts or bit.link.rows is None:
        return rows, [((0, rows), 0)]
    parts, ranges = bit.link.rows
    own = sum(stop - start for start, stop in ranges)
    given = own if bit.to is Naming.ORIGINAL else parts
    unit, rest = divmod(rows, given)
    if rest:
        raise CheckpointError(
            f"module '{bit.module.name}' in {adapter.path}: expected a multiple of {given} rows of "
            f"B, which are rows of '{bit.link.names[1]}', got {rows}. Download the adapter again."
        )
    spans, done = [], 0
    for start, stop in ranges:
        count = (stop - start) * unit
        if bit.to is Naming.ORIGINAL:
            spans.append(((done, done + count), start * unit))
        else:
            spans.append(((start * unit, stop * unit), done))
        done += count
    return (parts if bit.to is Naming.ORIGINAL else own) * unit, spans


def _up(module: AdapterModule) -> TensorInfo:
    assert module.up is not None  # of a LoRA
    return module.up


def _info(key: str, dtype: str, shape: tuple[int, ...], adapter: Adapter) -> TensorInfo:
    nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
    return TensorInfo(key, dtype, shape, adapter.checkpoint.path, 0, nbytes)

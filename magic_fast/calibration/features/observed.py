"""Sites of parameters that no layer of their own stands for: stacks of experts, projections inside
a larger module, weights of layers that are not called.

A run of the code under :class:`Tracked` shows each operation that is linear in them. The parts of
parameters in it are a site: one expert of a stack, the rows of one projection, a whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.padding import Positions
from magic_fast.calibration.features.sites import (
    CHUNK_ELEMENTS,
    Call,
    Parameters,
    Part,
    Site,
    forward_with,
    wide,
)
from magic_fast.calibration.features.tracked import (
    OTHERS,
    Made,
    Piece,
    Tracked,
    Use,
    Weight,
    aten,
    pieces,
)

UNREACHED = "no sample reaches this expert"
_CHANNELS_SECOND = set(OTHERS) - {
    aten.embedding, aten.mul, aten.native_layer_norm, aten._fused_rms_norm,
}  # fmt: skip
Shapes = Mapping[str, tuple[int, ...]]
Key = tuple[tuple[str, str], ...]  # (parameter, its rows) of all parts


@dataclass
class Map:
    """One linear operation: what it receives and how its weight and bias come from parameters.

    Attributes:
        weight: of a product: [in, out]; else the operation's first one.
        inputs: of a product: [rows, in]; else the operation's.
        bias: what is added.
        call: (operation, its arguments, the place of ``inputs``); None: a product.
        routed: whether it is one of a batch of products, in which rows of zeros are room that was
            not needed.
    """

    weight: Weight
    inputs: Tensor
    bias: list[Weight]
    call: tuple[Any, tuple[Any, ...], int] | None = None
    routed: bool = False

    @property
    def parts(self) -> Iterator[Piece]:
        yield from pieces([self.weight, *self.bias, *(self.call[1] if self.call else ())])


def maps_of(use: Use) -> Iterator[Map]:
    """The linear maps in one operation: one, or those of a batch of products."""
    op, args, bias = use.op.overloadpacket, list(use.args), list(use.bias)
    if op in OTHERS:
        weights = [n for n, x in enumerate(args) if isinstance(x, Piece | Made)]
        place = next(n for n in range(len(args)) if n not in weights)
        yield Map(args[weights[0]], args[place], bias, (use.op, tuple(args), place))
        return
    if op in (aten.addmm, aten.baddbmm, aten.addmv):
        first = args.pop(0)
        bias += [first] if isinstance(first, Piece | Made) else []
    a, b = args
    if op in (aten.bmm, aten.baddbmm):
        for n in range(len(b if isinstance(a, Piece | Made) else a)):
            own = [_chosen(x, n) if _dims(x) > 2 else x for x in bias]
            yield _product(_chosen(a, n), _chosen(b, n), own, routed=True)
        return
    if op in (aten.mv, aten.addmv):
        b = b[:, None] if isinstance(b, Tensor) else _made(aten.unsqueeze.default, b, 1)
    yield _product(a, b, bias)


def _product(a: Any, b: Any, bias: list[Weight], *, routed: bool = False) -> Map:
    if isinstance(a, Piece | Made):  # (W z)ᵀ = zᵀ Wᵀ
        return Map(_made(aten.t.default, a), b.t(), bias, routed=routed)
    return Map(b, a, bias, routed=routed)


def _made(op: Any, weight: Weight, *args: Any) -> Weight:
    if op is aten.t.default and isinstance(weight, Piece):
        return replace(weight, shape=weight.shape[::-1], stride=weight.stride[::-1])
    return Made(op, (weight, *args), {}, None)


def _chosen(x: Any, n: int) -> Any:
    """One of a batch."""
    if isinstance(x, Piece):
        return Piece(x.name, x.shape[1:], x.stride[1:], x.offset + n * x.stride[0])
    return _made(aten.select.int, x, 0, n) if isinstance(x, Made) else x[n]


def _dims(weight: Weight) -> int:
    return len(weight.shape) if isinstance(weight, Piece) else 0


def rows_of(piece: Piece, shape: Sequence[int]) -> slice | None:
    """The rows of a parameter that a piece is; None: all of it, or a part that is no rows.

    >>> rows_of(Piece("w", (4, 3), (3, 1), 6), (8, 3))
    slice(2, 6, None)
    """
    row = math.prod(shape[1:])
    extents = [(n, s) for n, s in zip(piece.shape, piece.stride, strict=True) if s]
    first = piece.offset // row
    last = (piece.offset + sum((n - 1) * s for n, s in extents)) // row
    whole = (first, last) == (0, shape[0] - 1)
    if whole or math.prod(n for n, _ in extents) != (last - first + 1) * row:
        return None
    return slice(first, last + 1)


def parts_of(found: Map, shapes: Shapes) -> dict[str, slice | None]:
    """Parameter → the rows that a map has of it."""
    rows: dict[str, slice | None] = {}
    for piece in found.parts:
        own = rows_of(piece, shapes[piece.name])
        rows[piece.name] = None if rows.get(piece.name, own) != own else own
    return rows


def key_of(weight: Weight, rows: Mapping[str, slice | None]) -> Key:
    """What tells a map from others: the parts that its weight comes from."""
    return tuple(sorted((name, str(rows[name])) for name in {p.name for p in pieces(weight)}))


def sites_of(found: Map, shapes: Shapes, full: Callable[[str], str]) -> list[tuple[Key, Site]]:
    """The site of a map; where it is an expert of a stack, those of all experts.

    Args:
        shapes: of the parameters of the station's module.
        full: name of one of them → in the model.
    """
    rows = parts_of(found, shapes)
    main = next(pieces(found.weight)).name
    own, name = rows[main], full(main).removesuffix(".weight")
    if own is None or len(shapes[main]) < 3 or own.stop - own.start > 1:
        label = name if own is None else f"{name}[{own.start}:{own.stop}]"
        return [_site(label, found, rows, shapes, full)]
    sites = []
    for expert in range(shapes[main][0]):
        by = expert - own.start
        moved = {n: slice(r.start + by, r.stop + by) if r == own else r for n, r in rows.items()}
        key, site = _site(f"{name}.{expert}", found, rows, shapes, full, moved)
        site.axes = dict.fromkeys(moved)
        site.unreached = UNREACHED
        sites.append((key, site))
    return sites


def _site(
    name: str,
    found: Map,
    rows: Mapping[str, slice | None],
    shapes: Shapes,
    full: Callable[[str], str],
    moved: Mapping[str, slice | None] | None = None,
) -> tuple[Key, Site]:
    """A site that applies a map's weight and bias; ``moved``: to other rows than it has."""
    starts = {n: r.start * math.prod(shapes[n][1:]) for n, r in rows.items() if r is not None}
    shape = _shape_of(found.weight, shapes)
    weight, bias, call = (_from(x, starts) for x in (found.weight, found.bias, found.call))
    dim = -1
    if call is not None:  # without what it received
        call = call[0], tuple(None if n == call[2] else x for n, x in enumerate(call[1])), call[2]
        if call[0].overloadpacket in _CHANNELS_SECOND:
            dim = 1
        elif call[0].overloadpacket is aten.mul:
            dim = next((n - len(shape) for n in reversed(range(len(shape))) if shape[n] > 1), -1)
    parts = tuple(Part(local, full(local), own) for local, own in (moved or rows).items())
    key = key_of(found.weight, moved or rows)

    def inputs(call: Call) -> list[Map]:
        return call.seen.get(key, [])

    def apply(z: Tensor, parameters: Parameters) -> Tensor:
        out: Tensor
        if call is None:
            out = z @ weight.value(parameters, linear=True)
        else:
            op, args, place = call
            values = [
                x.value(parameters, linear=True) if isinstance(x, Piece | Made) else x for x in args
            ]
            values[place] = z
            out = _first(op(*values))
        for b in bias:
            value = b.value(parameters, linear=True)
            out = out + value.reshape([-1 if n == dim % out.dim() else 1 for n in range(out.dim())])
        return out

    site = ObservedSite(name, parts, inputs, apply, channel_dim=dim, known=True)
    if call is None:
        site.flat, site.width = True, max(shape)
        if isinstance(weight, Piece) and math.prod(shape) == _numel(parts[0], shapes):
            site.in_axis = -1 if weight.stride[0] == 1 else -2
    return key, site


def _numel(part: Part, shapes: Shapes) -> int:
    """Elements of what a site has of a parameter."""
    shape = shapes[part.local]
    rows = shape[0] if part.rows is None else part.rows.stop - part.rows.start
    return rows * math.prod(shape[1:])


def _shape_of(weight: Weight, shapes: Shapes) -> tuple[int, ...]:
    names = {piece.name for piece in pieces(weight)}
    own = {n: torch.empty(shapes[n], device="meta") for n in names}
    return tuple(weight.value(own, linear=True).shape)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _from(x: Any, starts: Mapping[str, int]) -> Any:
    """What is made of parameters, made of their rows from a start on."""
    if isinstance(x, Piece):
        return replace(x, offset=x.offset - starts.get(x.name, 0))
    if isinstance(x, Made):
        return replace(x, args=_from(x.args, starts))
    return type(x)(_from(y, starts) for y in x) if type(x) in (tuple, list) else x


class ObservedSite(Site):
    """A site whose inputs are operations that were seen."""

    def features(
        self, inputs: Any, parameters: Sequence[Parameters], positions: Positions | None
    ) -> Iterator[list[Tensor]]:
        maps: Iterable[Map] = inputs
        for found in maps:
            if self.flat:
                for z in self.rows([found], positions):
                    yield [self.apply(z, p) for p in parameters]
            else:
                z = wide(found.inputs)
                yield [self._rows(self.apply(z, p), None, positions) for p in parameters]

    def rows(self, inputs: Any, positions: Positions | None) -> Iterator[Tensor]:
        maps: Iterable[Map] = inputs
        for found in maps:
            z = wide(found.inputs)
            if found.routed:
                z = z[z.abs().amax(-1) > 0]
            mask = None if positions is None else positions.of(tuple(z.shape[:-1]))
            z = z if mask is None else z[mask]
            yield from z.split(max(1, CHUNK_ELEMENTS // max(1, self.width)))


def observe(
    module: nn.Module, call: Call, positions: Positions | None
) -> tuple[list[Use], dict[str, str]]:
    """A module's own forward on what it received, in float32: what it did with its parameters, and
    in which other operations they were.

    Where the flat rows of its inputs are known to be padding, it does not get them.
    """
    own = {n: wide(p.detach()) for n, p in module.named_parameters(recurse=False)}
    args, kwargs = wide(call.args), {k: wide(v) for k, v in call.kwargs.items()}
    first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if positions is not None and first is not None and first.dim() > 1:
        mask = positions.of(tuple(first.shape[:-1]))
        if mask is not None and first.dim() == 2:
            args = tuple(_rows(x, mask) for x in args)
            kwargs = {k: _rows(x, mask) for k, x in kwargs.items()}
        elif mask is not None:
            positions.unknown = True
    uses: list[Use] = []
    with Tracked(own, uses.append) as tracked:
        forward_with(module, own, args, kwargs)
    return uses, tracked.unknown


def _rows(x: Any, mask: Tensor) -> Any:
    return x[mask] if isinstance(x, Tensor) and x.dim() and len(x) == len(mask) else x

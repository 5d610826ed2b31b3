"""The linear maps in operations: what each receives, and which parts of parameters it has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from magic_fast.calibration.features.operations.uses import (
    OTHERS,
    Made,
    Piece,
    Use,
    Weight,
    aten,
    pieces,
)

Shapes = Mapping[str, tuple[int, ...]]
Key = tuple[tuple[str, str], ...]  # (parameter, its rows) of all parts
Form = tuple[object, ...]  # how something is made of parameters


@dataclass
class Map:
    """One linear operation: what it receives and how its weight and bias come from parameters.

    Attributes:
        weight: of a product: [in, out]; else the operation's first one.
        inputs: of a product: [rows, in]; else the operation's.
        bias: what the operation itself adds.
        added: what is added to its result; not known while it runs.
        call: (operation, its arguments, the place of ``inputs``); None: a product.
        routed: whether it is one of a batch of products, in which rows of zeros are room that was
            not needed.
    """

    weight: Weight
    inputs: Tensor
    bias: list[Weight]
    added: list[Weight]
    call: tuple[Any, tuple[Any, ...], int] | None = None
    routed: bool = False

    @property
    def parts(self) -> Iterator[Piece]:
        yield from pieces([*self.own, *self.added])

    @property
    def own(self) -> list[Any]:
        """What the operation itself has."""
        op, args, place = self.call or (None, (), 0)
        return [op, self.weight, *self.bias, *args[:place], *args[place + 1 :]]


def maps_of(use: Use) -> Iterator[Map]:
    """The linear maps in one operation: one, or those of a batch of products."""
    op, args, added = use.op.overloadpacket, list(use.args), list(use.bias)
    if op in OTHERS:
        weights = [n for n, x in enumerate(args) if isinstance(x, Piece | Made)]
        place = next(n for n in range(len(args)) if n not in weights)
        yield Map(args[weights[0]], args[place], [], added, (use.op, tuple(args), place))
        return
    bias: list[Weight] = []
    if op in (aten.addmm, aten.baddbmm, aten.addmv):
        first = args.pop(0)
        bias = [first] if isinstance(first, Piece | Made) else []
    a, b = args
    if op in (aten.bmm, aten.baddbmm):
        for n in range(len(b if isinstance(a, Piece | Made) else a)):
            own = [_chosen(x, n) if dims_of(x) > 2 else x for x in bias]
            yield _product(_chosen(a, n), _chosen(b, n), own, added, routed=True)
        return
    if op in (aten.mv, aten.addmv):
        b = b[:, None] if isinstance(b, Tensor) else _made(aten.unsqueeze.default, b, 1)
    yield _product(a, b, bias, added)


def _product(
    a: Any, b: Any, bias: list[Weight], added: list[Weight], *, routed: bool = False
) -> Map:
    if isinstance(a, Piece | Made):  # (W z)ᵀ = zᵀ Wᵀ
        return Map(_made(aten.t.default, a), b.t(), bias, added, routed=routed)
    return Map(b, a, bias, added, routed=routed)


def _made(op: Any, weight: Weight, *args: Any) -> Weight:
    if op is aten.t.default and isinstance(weight, Piece):
        return replace(weight, shape=weight.shape[::-1], stride=weight.stride[::-1])
    return Made(op, (weight, *args), {}, None)


def _chosen(x: Any, n: int) -> Any:
    """One of a batch."""
    if isinstance(x, Piece):
        return Piece(x.name, x.shape[1:], x.stride[1:], x.offset + n * x.stride[0])
    return _made(aten.select.int, x, 0, n) if isinstance(x, Made) else x[n]


def dims_of(weight: Weight) -> int:
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


def form_of(made: Any) -> Form:
    """What is equal for things that are made alike of the same parts.

    >>> form_of([Piece("w", (2,), (1,), 0)]) == form_of([Piece("w", (2,), (1,), 2)])
    False
    """
    if isinstance(made, Made):
        return (str(made.op), form_of(made.args), made.output)
    if isinstance(made, tuple | list):
        return tuple(map(form_of, made))
    return ("tensor", *made.shape) if isinstance(made, Tensor) else (made,)


def from_rows(made: Any, starts: Mapping[str, int]) -> Any:
    """What is made of parameters, made of their rows from a start (in elements) on."""
    if isinstance(made, Piece):
        return replace(made, offset=made.offset - starts.get(made.name, 0))
    if isinstance(made, Made):
        return replace(made, args=from_rows(made.args, starts))
    return type(made)(from_rows(y, starts) for y in made) if type(made) in (tuple, list) else made

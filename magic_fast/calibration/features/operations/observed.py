"""Sites of parameters that no layer of their own stands for: stacks of experts, projections inside
a larger module, weights of layers that are not called.

A run of the code under :class:`Tracked` shows each operation that is linear in them. The parts of
parameters in it are a site: one expert of a stack, the rows of one projection, a whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.operations.maps import (
    Form,
    Key,
    Map,
    Shapes,
    form_of,
    from_rows,
    key_of,
    parts_of,
)
from magic_fast.calibration.features.operations.tracked import Tracked
from magic_fast.calibration.features.operations.uses import (
    OTHERS,
    Made,
    Piece,
    Use,
    Weight,
    aten,
    pieces,
)
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

UNREACHED = "no sample reaches this expert"
SOMETIMES = "not all uses of its weight have it"
_CHANNELS_SECOND = set(OTHERS) - {
    aten.embedding, aten.mul, aten.native_layer_norm, aten._fused_rms_norm,
}  # fmt: skip
Applied = tuple[Map, Tensor]  # a use of a site, and some of what it receives


@dataclass
class ObservedSite(Site):
    """A site whose inputs are operations that were seen.

    Each use has its own form of the weight (its transpose, some of its columns), and adds its own.

    Attributes:
        fixed: the parameters that an operation itself has.
        added: what is added to results, by the form of the operation; of the rows of ``parts``.
        shapes: of the parameters of its module.
    """

    fixed: frozenset[str] = frozenset()
    added: dict[Form, list[Weight]] = field(default_factory=dict, repr=False)
    shapes: Shapes = field(default_factory=dict, repr=False)

    def starts(self) -> dict[str, int]:
        """Where the rows of each parameter begin, in elements."""
        rows = {p.local: p.rows for p in self.parts if p.rows is not None}
        return {n: r.start * math.prod(self.shapes[n][1:]) for n, r in rows.items()}

    def has(self, use: Map) -> bool:
        """Whether a use of its weights is of a form that it knows."""
        starts = self.starts()
        known = self.added.get(form_of(from_rows(use.own, starts)))
        return known is not None and form_of(known) == form_of(from_rows(use.added, starts))

    def join(self, other: ObservedSite) -> set[str]:
        """Takes the uses of another with the same parts of weights; returns the parameters that are
        in none after all: not always added to the same."""
        rows, further = ({p.local: p for p in site.parts} for site in (self, other))
        both = [n for n in rows if n in further and rows[n].rows != further[n].rows]
        for site in (self, other):  # all rows from now on
            by = {n: -start for n, start in site.starts().items() if n in both}
            site.added = {form: from_rows(own, by) for form, own in site.added.items()}
        parts = rows | further | {n: Part(n, rows[n].name) for n in both}
        self.parts, self.fixed = tuple(parts.values()), self.fixed | other.fixed
        odd: set[str] = set()
        for form, added in other.added.items():
            own = self.added.setdefault(form, added)
            if form_of(own) != form_of(added):
                odd |= {p.name for p in pieces([own, added])}
        for form, added in self.added.items():
            self.added[form] = [b for b in added if not {p.name for p in pieces(b)} & odd]
        gone = odd - self.fixed
        self.parts = tuple(p for p in self.parts if p.local not in gone)
        if self.in_axis != other.in_axis:
            self.in_axis = None
        return gone

    def features(
        self, inputs: Any, parameters: Sequence[Parameters], positions: Positions | None
    ) -> Iterator[list[Tensor]]:
        uses: Iterable[Map] = inputs
        for found in uses:
            if found.call is None:
                for z in self.rows([found], positions):
                    yield [self.apply((found, z), p) for p in parameters]
            else:
                self.channel_dim = self._dim(found)
                z = wide(found.inputs)
                yield [self._rows(self.apply((found, z), p), None, positions) for p in parameters]

    def rows(self, inputs: Any, positions: Positions | None) -> Iterator[Tensor]:
        uses: Iterable[Map] = inputs
        for found in uses:
            if found.call is None:
                z = wide(found.inputs)
                if found.routed:
                    z = z[z.abs().amax(-1) > 0]
                mask = None if positions is None else positions.of(tuple(z.shape[:-1]))
                z = z if mask is None else z[mask]
                width = max(_shape_of(found.weight, self.shapes))
                yield from z.split(max(1, CHUNK_ELEMENTS // max(1, width)))

    def value(self, inputs: Applied, parameters: Parameters) -> Tensor:
        """What a use gives of some of its inputs with other parameters."""
        found, z = inputs
        starts = self.starts()

        def filled(x: Any) -> Any:
            own = from_rows(x, starts)
            return own.value(parameters, linear=True) if isinstance(x, Piece | Made) else x

        out: Tensor
        if found.call is None:
            weight = filled(found.weight)
            out = z.to(torch.promote_types(z.dtype, weight.dtype)) @ weight
        else:
            op, args, place = found.call
            values = [None if n == place else filled(x) for n, x in enumerate(args)]
            like = next(iter(parameters.values())).dtype
            values[place] = z.to(torch.promote_types(z.dtype, like)) if z.is_floating_point() else z
            out = _first(op(*values))
        dim = self._dim(found) % out.dim()
        for b in [*map(filled, found.bias), *self._added(found, starts, parameters)]:
            out = out + b.reshape([-1 if n == dim else 1 for n in range(out.dim())])
        return out

    def _added(
        self, found: Map, starts: Mapping[str, int], parameters: Parameters
    ) -> Iterator[Tensor]:
        """What is added to the result of a use: as it was when its form was first seen."""
        known = self.added.get(form_of(from_rows(found.own, starts)))
        if known is None:  # of another form: by all that were seen
            several = {form_of(x): x for x in self.added.values()}
            known = next(iter(several.values())) if len(several) == 1 else None
        if known is None:
            known = [from_rows(x, starts) for x in found.added]
        for b in known:
            yield b.value(parameters, linear=True)

    def _dim(self, found: Map) -> int:
        """Where a use has its features."""
        if found.call is None:
            return -1
        if found.call[0].overloadpacket in _CHANNELS_SECOND:
            return 1
        shape = _shape_of(found.weight, self.shapes)
        if found.call[0].overloadpacket is aten.mul:
            return next((n - len(shape) for n in reversed(range(len(shape))) if shape[n] > 1), -1)
        return -1


def sites_of(
    found: Map, shapes: Shapes, full: Callable[[str], str]
) -> list[tuple[Key, ObservedSite]]:
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
) -> tuple[Key, ObservedSite]:
    """A site with the weight and bias of a map; ``moved``: of other rows than it has."""
    key = key_of(found.weight, moved or rows)
    first = tuple(Part(local, full(local), own) for local, own in rows.items())
    site = ObservedSite(
        name,
        first,
        lambda call: call.seen.get(key, []),
        lambda inputs, parameters: site.value(inputs, parameters),
        known=True,
        fixed=frozenset(p.name for p in pieces(found.own)),
        shapes=shapes,
    )
    starts = site.starts()
    site.added = {form_of(from_rows(found.own, starts)): from_rows(found.added, starts)}
    if found.call is None and isinstance(weight := from_rows(found.weight, starts), Piece):
        ins, outs = weight.shape
        if ins * outs == _numel(first[0], shapes) and not weight.offset:
            strides: dict[tuple[int, ...], int] = {(1, ins): -1, (outs, 1): -2}
            site.in_axis = strides.get(weight.stride)
    if moved is not None:
        site.parts = tuple(Part(local, full(local), own) for local, own in moved.items())
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

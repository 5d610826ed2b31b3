"""Where features are measured: the linear maps of a model.

A *site* is one map that is linear in its own parameters: a linear layer, a convolution, an
embedding, a norm, one projection of a fused attention. A *station* is the module at whose call
the sites' inputs are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.padding import Positions

Parameters = Mapping[str, Tensor]
CHUNK_ELEMENTS = 1 << 23  # of one feature that is held at a time
_AFFINE_ERROR = 1e-4  # of the change's largest magnitude; float32 rounds at 1e-7 a term


@dataclass(frozen=True)
class Call:
    """One call of a station: what its module received, and the operations seen in it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    seen: dict[Any, list[Any]] = field(default_factory=dict, repr=False)

    def again(self) -> None:
        """As the model made it, without hooks; nothing where operations are all that is known."""
        if self.args or self.kwargs:
            self.module.forward(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Part:
    """A parameter of a site: ``local`` name in the station's module, ``name`` in the model;
    ``rows`` of it where several sites share it."""

    local: str
    name: str
    rows: slice | None = None

    def cut(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]


@dataclass
class Site:
    """One linear map.

    Attributes:
        name: for reports: the module's, or ``module.in_proj.q`` for a part of a fused one.
        parts: its parameters.
        inputs: what the map receives, from a call of its station.
        apply: (inputs, parameters) → output; its affine part counts.
        channel_dim: dimension of the output that holds the features.
        flat: whether positions are independent rows of ``inputs``, so that it can run in chunks.
        known: linear (not only affine) by its type; else it is tried on its first input.
        width: features of a position, where it is flat.
        refused: why it is no linear map.
        axes: parameter → its axis that runs over the features, or None.
        in_axis: axis of the first part's last two that its inputs run along, of a product with a
            matrix; None: it is none.
        unreached: what to say where no input ever comes.
        remark: what to say of its ξ.
        several: whether its module gives more than this output, which may follow from it.
    """

    name: str
    parts: tuple[Part, ...]
    inputs: Callable[[Call], Any]
    apply: Callable[[Any, Parameters], Tensor]
    channel_dim: int = -1
    flat: bool = False
    known: bool = False
    width: int = 0
    refused: str = ""
    axes: dict[str, int | None] | None = field(default=None, repr=False)
    in_axis: int | None = None
    unreached: str = "never called"
    remark: str = ""
    several: bool = False

    def features(
        self, inputs: Any, parameters: Sequence[Parameters], positions: Positions | None
    ) -> Iterator[list[Tensor]]:
        """Output of the linear part for each set of parameters, [positions, channels], in pieces
        of some positions; where ``positions`` tells which are padding, without those."""
        if not self.flat:
            zeros = {k: torch.zeros_like(v) for k, v in parameters[0].items()}
            for some in self._some(inputs):
                zero = None if self.known else self.apply(some, zeros)
                yield [self._rows(self.apply(some, p), zero, positions) for p in parameters]
            return
        for piece in self.rows(inputs, positions):
            yield [self.apply(piece, p) for p in parameters]

    def _some(self, inputs: Any) -> Iterator[Any]:
        """Calls of a known layer with some of the samples at a time."""
        args, kwargs = inputs
        x = args[0] if len(args) == 1 and not kwargs else None
        if not (self.known and isinstance(x, Tensor) and x.dim() > 2 and len(x) > 1):
            yield inputs
            return
        step = max(1, CHUNK_ELEMENTS * len(x) // max(1, x.numel()))
        for some in torch.split(x, step):
            yield (some,), kwargs

    def rows(self, inputs: Any, positions: Positions | None) -> Iterator[Tensor]:
        """What a flat site receives, without padding, in pieces: [positions, in], or indices."""
        floating = inputs.is_floating_point()
        lead = inputs.shape[:-1] if floating else inputs.shape
        flat = inputs.reshape(-1, inputs.shape[-1]) if floating else inputs.reshape(-1)
        mask = None if positions is None else positions.of(tuple(lead))
        if mask is not None:
            flat = flat[mask]
        yield from flat.split(max(1, CHUNK_ELEMENTS // max(1, self.width)))

    def _rows(self, output: Tensor, zero: Tensor | None, positions: Positions | None) -> Tensor:
        feature = output if zero is None else output - zero
        if feature.dim() == 0:
            return feature.reshape(1, 1)
        feature = feature.movedim(self.channel_dim, -1)
        mask = None if positions is None else positions.of(tuple(feature.shape[:-1]))
        rows = feature.reshape(-1, feature.shape[-1])
        return rows if mask is None else rows[mask]

    def try_affine(self, inputs: Any, like: Parameters) -> None:
        """Sets ``refused`` where the output is not affine in the parameters: the value at a middle
        is not the middle of the values. Else finds where the output has its features."""
        generator = torch.Generator().manual_seed(0)
        one = {k: _noise(v, generator) for k, v in like.items()}
        other = {k: _noise(v, generator) for k, v in like.items()}
        middle = {k: (one[k] + other[k]) / 2 for k in one}
        try:
            a, b, c = (self.apply(inputs, p) for p in (one, other, middle))
            error = ((a + b) / 2 - c).abs().max()
            affine = bool(error <= _AFFINE_ERROR * (a - b).abs().max())
        except (RuntimeError, TypeError, AttributeError):
            affine = False
        if not affine:
            self.refused = "its output is not linear in its parameters"
            return
        if not all(self._follows(inputs, like, local) for local in like):
            self.refused = "its output does not follow all of its parameters"
            return
        found = [self._channels(inputs, like, local) for local in like]
        known = [dim for dim in found if dim is not None]
        if known:
            self.channel_dim = known[0]
        else:
            self.remark = "its features are taken along the last axis: no parameter tells which"

    def _follows(self, inputs: Any, like: Parameters, local: str) -> bool:
        """Whether the output changes with one parameter alone."""
        alone = self._alone(like, local)
        zero = self.apply(inputs, {k: torch.zeros_like(v) for k, v in like.items()})
        return bool((self.apply(inputs, alone) - zero).abs().max() > 0)

    def _channels(self, inputs: Any, like: Parameters, local: str) -> int | None:
        """The dimension of the output (from its end) that a parameter has an axis for, found by
        scaling the parameter along it."""
        zero = self.apply(inputs, {k: torch.zeros_like(v) for k, v in like.items()})
        alone = self._alone(like, local)
        plain = self.apply(inputs, alone) - zero
        for axis, channels in enumerate(like[local].shape):
            dims = [d for d in range(-1, -1 - plain.dim(), -1) if plain.shape[d] == channels > 1]
            if dims:
                factor, scaled = self._scaled(alone, local, axis, channels)
                found = self.apply(inputs, scaled) - zero
                for dim in dims:
                    if _is_scaled(found.movedim(dim, -1), plain.movedim(dim, -1), factor):
                        return dim
        return None

    def channel_axes(self, inputs: Any, like: Parameters, channels: int) -> dict[str, int | None]:
        """The axis of each parameter that runs over the output's channels (None: it has none),
        found by scaling along it."""
        if self.axes is None:
            self.axes = {p.local: self._axis(inputs, like, p.local, channels) for p in self.parts}
        return self.axes

    def _axis(self, inputs: Any, like: Parameters, local: str, channels: int) -> int | None:
        alone = self._alone(like, local)
        rows = [f[0] for f in self.features(inputs, [alone], None)]
        plain = torch.cat(rows) if rows else torch.empty(0)
        if not plain.numel() or plain.shape[-1] != channels:
            return None
        for axis, extent in enumerate(like[local].shape):
            if extent == channels:
                factor, scaled = self._scaled(alone, local, axis, channels)
                found = torch.cat([f[0] for f in self.features(inputs, [scaled], None)])
                if _is_scaled(found, plain, factor):
                    return axis
        return None

    @staticmethod
    def _alone(like: Parameters, local: str) -> dict[str, Tensor]:
        """Noise for one parameter, 0 for the others."""
        generator = torch.Generator().manual_seed(1)
        return {
            k: _noise(v, generator) if k == local else torch.zeros_like(v) for k, v in like.items()
        }

    @staticmethod
    def _scaled(
        alone: Parameters, local: str, axis: int, channels: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Different factors for the indices of an axis, and the parameters scaled by them."""
        own = alone[local]
        generator = torch.Generator().manual_seed(2)
        factor = 1 + torch.rand(channels, generator=generator, dtype=torch.float64)
        factor = factor.to(own)
        shape = [channels if a == axis else 1 for a in range(own.dim())]
        return factor, {**alone, local: own * factor.view(shape)}


def _is_scaled(found: Tensor, plain: Tensor, factor: Tensor) -> bool:
    largest = float(plain.abs().max())
    want = (plain * factor).to(found.dtype)
    return largest > 0 and torch.allclose(found, want, rtol=1e-3, atol=1e-4 * largest)


@dataclass
class Station:
    """A hooked module and its sites, in stages: a later stage's inputs come after the earlier ones'
    maps.

    Attributes:
        observed: whether the sites' inputs are operations that were seen (:mod:`.operations`).
        called: whether they come by calls of the module; else wherever the operations are.
    """

    name: str
    module: nn.Module
    stages: tuple[tuple[Site, ...], ...]
    observed: bool = False
    called: bool = True

    @property
    def sites(self) -> Iterator[Site]:
        return (site for stage in self.stages for site in stage)


def forward_with(
    module: nn.Module, parameters: Parameters, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """``module.forward`` with other values for its parameters (dotted names); its hooks do not
    run. Buffers of a lower precision than the values are widened with them."""
    places: list[tuple[dict[str, Any], str, Any]] = []
    dtype = torch.float16  # no wider than any
    for name, value in parameters.items():
        owner, _, local = name.rpartition(".")
        places.append((module.get_submodule(owner)._parameters, local, value))
        dtype = value.dtype if value.dtype.itemsize > dtype.itemsize else dtype
    for owned in (m._buffers for m in module.modules()):
        for local, buffer in owned.items():
            if buffer is not None and buffer.is_floating_point():
                if buffer.dtype.itemsize < dtype.itemsize:
                    places.append((owned, local, buffer.to(dtype)))
    kept = [(table, local, table[local]) for table, local, _ in places]
    try:
        for table, local, value in places:
            table[local] = value
        return module.forward(*args, **kwargs)
    finally:
        for table, local, own in kept:
            table[local] = own


def wide(value: Any) -> Any:
    """Floating tensors of a call in float32 (float64 stays)."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.float()
    if isinstance(value, tuple | list):
        return type(value)(wide(v) for v in value) if type(value) in (tuple, list) else value
    return value


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)

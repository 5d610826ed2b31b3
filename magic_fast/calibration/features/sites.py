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

Parameters = Mapping[str, Tensor]
CHUNK_ELEMENTS = 1 << 23  # of one feature that is held at a time
_AFFINE_ERROR = 1e-4  # of the change's largest magnitude; float32 rounds at 1e-7 a term


@dataclass(frozen=True)
class Call:
    """One call of a station: what its module received."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


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

    def features(
        self, inputs: Any, parameters: Sequence[Parameters], mask: Tensor | None
    ) -> Iterator[list[Tensor]]:
        """Output of the linear part for each set of parameters, [positions, channels], in pieces
        of some positions; where ``mask`` [samples, length] is given and fits, only its
        positions."""
        if not self.flat:
            zero = None
            if not self.known:
                zero = self.apply(
                    inputs, {k: torch.zeros_like(v) for k, v in parameters[0].items()}
                )
            yield [self._rows(self.apply(inputs, p), zero, mask) for p in parameters]
            return
        floating = inputs.is_floating_point()  # else indices
        lead = inputs.shape[:-1] if floating else inputs.shape
        flat = inputs.reshape(-1, inputs.shape[-1]) if floating else inputs.reshape(-1)
        if mask is not None and mask.shape == lead:
            flat = flat[mask.flatten()]
        step = max(1, CHUNK_ELEMENTS // max(1, self.width))
        for piece in flat.split(step):
            yield [self.apply(piece, p) for p in parameters]

    def _rows(self, output: Tensor, zero: Tensor | None, mask: Tensor | None) -> Tensor:
        feature = output if zero is None else output - zero
        if feature.dim() == 0:
            return feature.reshape(1, 1)
        feature = feature.movedim(self.channel_dim, -1)
        lead, rows = feature.shape[:-1], feature.reshape(-1, feature.shape[-1])
        return rows[mask.flatten()] if mask is not None and mask.shape == lead else rows

    def try_affine(self, inputs: Any, like: Parameters) -> None:
        """Sets ``refused`` where the output is not affine in the parameters: the value at a middle
        is not the middle of the values."""
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

    def channel_axes(self, inputs: Any, like: Parameters, channels: int) -> dict[str, int | None]:
        """The axis of each parameter that runs over the output's channels (None: it has none),
        found by scaling along it."""
        if self.axes is None:
            self.axes = {p.local: self._axis(inputs, like, p.local, channels) for p in self.parts}
        return self.axes

    def _axis(self, inputs: Any, like: Parameters, local: str, channels: int) -> int | None:
        generator = torch.Generator().manual_seed(1)
        alone = {k: _noise(v, generator) if k == local else torch.zeros_like(v)
                 for k, v in like.items()}  # fmt: skip
        factor = 1 + torch.rand(channels, generator=generator, dtype=torch.float64)
        factor = factor.to(like[local])
        plain = torch.cat([f[0] for f in self.features(inputs, [alone], None)])
        if not plain.numel() or plain.shape[-1] != channels:
            return None
        for axis, extent in enumerate(like[local].shape):
            if extent != channels:
                continue
            shape = [channels if a == axis else 1 for a in range(like[local].dim())]
            scaled = {**alone, local: alone[local] * factor.view(shape)}
            found = torch.cat([f[0] for f in self.features(inputs, [scaled], None)])
            if torch.allclose(
                found, plain * factor, rtol=1e-3, atol=1e-4 * float(plain.abs().max())
            ):
                return axis
        return None


@dataclass
class Station:
    """A hooked module and its sites, in stages: a later stage's inputs come after the earlier ones'
    maps."""

    name: str
    module: nn.Module
    stages: tuple[tuple[Site, ...], ...]

    @property
    def sites(self) -> Iterator[Site]:
        return (site for stage in self.stages for site in stage)


def forward_with(
    module: nn.Module, parameters: Parameters, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """``module.forward`` with other values for its parameters (dotted names); its hooks do not
    run."""
    places = []
    for name, value in parameters.items():
        owner, _, local = name.rpartition(".")
        places.append((module.get_submodule(owner)._parameters, local, value))
    kept = [(table, local, table[local]) for table, local, _ in places]
    try:
        for table, local, value in places:
            table[local] = value  # type: ignore[assignment]
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

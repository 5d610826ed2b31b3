"""Where features are measured: the linear maps of a model, found by walking its modules.

A *site* is one map that is linear in its own parameters: a linear layer, a convolution, an
embedding, a norm, one projection of a fused attention. A *station* is the module at whose call
the sites' inputs are seen. Any other module that holds parameters is tried on its first input and
taken where its output is affine in them; so no list of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = Mapping[str, Tensor]
CHUNK_ELEMENTS = 1 << 23  # of one feature that is held at a time
_AFFINE_ERROR = 1e-4  # of the change's largest magnitude; float32 rounds at 1e-7 a term

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNEL_NORMS = (
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_LINEAR_IN_PARAMETERS = (nn.Embedding, nn.LayerNorm, *_CONVS, *_TRANSPOSED, *_CHANNEL_NORMS)


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


def find_stations(model: nn.Module) -> tuple[list[Station], dict[str, str]]:
    """The stations of a model in the order of its modules, and why each other parameter has
    none."""
    stations: list[Station] = []
    left: dict[str, str] = {}
    inside: set[int] = set()  # modules that a fused one stands for
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        own = {k: p for k, p in module.named_parameters(recurse=False) if p.is_floating_point()}
        if isinstance(module, nn.MultiheadAttention):
            stations.append(_attention(name, module))
            inside.add(id(module.out_proj))
            for local in ("bias_k", "bias_v"):
                if getattr(module, local) is not None:
                    left[_full(name, local)] = "no linear map has it for a parameter"
        elif own and not any(True for child in module.children() for _ in child.parameters()):
            reason = _not_linear(module)
            if reason:
                left |= {_full(name, k): reason for k in own}
            else:
                stations.append(Station(name, module, ((_leaf(name, module, own),),)))
        else:
            left |= {_full(name, k): "no linear map has it for a parameter" for k in own}
    return stations, left


def _not_linear(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm is not linear in its weight"
    return ""


def _full(module: str, local: str) -> str:
    return f"{module}.{local}" if module else local


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _wide(value: Any) -> Any:
    """Floating tensors of a call in float32 (float64 stays)."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.float()
    if isinstance(value, tuple | list):
        return type(value)(_wide(v) for v in value) if type(value) in (tuple, list) else value
    return value


def _first_tensor(output: Any) -> Tensor:
    while isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError("no tensor comes out")
    return output


def _leaf(name: str, module: nn.Module, own: Mapping[str, Tensor]) -> Site:
    parts = tuple(Part(local, _full(name, local)) for local in own)
    kind, shape = type(module), next(iter(own.values())).shape
    if kind is nn.Linear or kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return Site(name, parts, _only_input, _linear, flat=True, known=True, width=shape[0])
    if kind.__name__ == "Conv1D" and set(own) <= {"weight", "bias"} and len(shape) == 2:
        # transformers' linear layer with its weight [in, out]
        return Site(name, parts, _only_input, _conv1d, flat=True, known=True, width=shape[1])
    if kind is nn.Embedding:
        return Site(name, parts, _only_input, _embedding, flat=True, known=True, width=shape[1])

    def apply(inputs: tuple[tuple[Any, ...], Mapping[str, Any]], parameters: Parameters) -> Tensor:
        args, kwargs = inputs
        return _first_tensor(forward_with(module, parameters, args, kwargs))

    dim = -1
    if isinstance(module, (*_CONVS, *_TRANSPOSED)):
        dim = -1 - len(module.kernel_size)
    elif isinstance(module, _CHANNEL_NORMS):
        dim = 1
    known = isinstance(module, _LINEAR_IN_PARAMETERS) or kind is getattr(nn, "RMSNorm", None)
    return Site(name, parts, _all_inputs, apply, channel_dim=dim, known=known)


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


def _only_input(call: Call) -> Tensor:
    z: Tensor = call.args[0] if call.args else next(iter(call.kwargs.values()))
    return _wide(z)  # type: ignore[no-any-return]


def _all_inputs(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _wide(call.args), {k: _wide(v) for k, v in call.kwargs.items()}


def _linear(z: Tensor, parameters: Parameters) -> Tensor:
    return F.linear(z, parameters["weight"], parameters.get("bias"))


def _conv1d(z: Tensor, parameters: Parameters) -> Tensor:
    return F.linear(z, parameters["weight"].t(), parameters.get("bias"))


def _embedding(z: Tensor, parameters: Parameters) -> Tensor:
    return F.embedding(z, parameters["weight"])


# The fused attention of torch: its projections are maps of their own.


def _attention(name: str, module: nn.MultiheadAttention) -> Station:
    d = module.embed_dim
    maps: list[Site] = []
    for n, which in enumerate(("q", "k", "v")):
        rows = slice(n * d, (n + 1) * d)
        fused = module._qkv_same_embed_dim
        weight = Part("in_proj_weight", _full(name, "in_proj_weight"), rows)
        if not fused:
            local = f"{which}_proj_weight"
            weight = Part(local, _full(name, local))
        parts = [weight]
        if module.in_proj_bias is not None:
            parts.append(Part("in_proj_bias", _full(name, "in_proj_bias"), rows))
        maps.append(
            Site(
                f"{name}.in_proj.{which}", tuple(parts), _attention_input(n), _projection,
                flat=True, known=True, width=d,
            )
        )  # fmt: skip
    out = [Part("out_proj.weight", _full(name, "out_proj.weight"))]
    if module.out_proj.bias is not None:
        out.append(Part("out_proj.bias", _full(name, "out_proj.bias")))
    last = Site(
        _full(name, "out_proj"), tuple(out), _attention_output, _projection,
        flat=True, known=True, width=d,
    )  # fmt: skip
    return Station(name, module, (tuple(maps), (last,)))


def _attention_input(position: int) -> Callable[[Call], Tensor]:
    def inputs(call: Call) -> Tensor:
        word = ("query", "key", "value")[position]
        found = call.args[position] if len(call.args) > position else call.kwargs[word]
        return _wide(found)  # type: ignore[no-any-return]

    return inputs


def _attention_output(call: Call) -> Tensor:
    """What the out-projection receives: the attention with the identity in its place."""
    module = call.module
    assert isinstance(module, nn.MultiheadAttention)
    weight = module.out_proj.weight
    identity = torch.eye(module.embed_dim, dtype=weight.dtype, device=weight.device)
    own = {"out_proj.weight": identity}
    if module.out_proj.bias is not None:
        own["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
    return _wide(forward_with(module, own, call.args, call.kwargs)[0])  # type: ignore[no-any-return]


def _projection(z: Tensor, parameters: Parameters) -> Tensor:
    bias = [v for k, v in parameters.items() if k.endswith("bias")]
    weight = next(v for k, v in parameters.items() if k.endswith("weight"))
    return F.linear(z, weight, bias[0] if bias else None)

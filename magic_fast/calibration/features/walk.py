"""Finds the sites of a model by walking its modules.

torch's own linear layers, convolutions, embeddings and norms are known; subclasses of them may do
anything. Every other module that holds parameters is tried on its first input
(:mod:`.discovery`), so no list of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magic_fast.calibration.features.sites import (
    Call,
    Parameters,
    Part,
    Site,
    Station,
    forward_with,
    wide,
)

# torch's layers that are linear in their parameters, and where their outputs have their channels.
_CHANNELS: dict[type[nn.Module], int] = {
    nn.LayerNorm: -1, nn.RMSNorm: -1, nn.GroupNorm: 1,
    nn.BatchNorm1d: 1, nn.BatchNorm2d: 1, nn.BatchNorm3d: 1, nn.SyncBatchNorm: 1,
    nn.InstanceNorm1d: -2, nn.InstanceNorm2d: -3, nn.InstanceNorm3d: -4,
    nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4,
    nn.ConvTranspose1d: -2, nn.ConvTranspose2d: -3, nn.ConvTranspose3d: -4,
}  # fmt: skip


def find_stations(model: nn.Module) -> tuple[list[Station], dict[str, str]]:
    """The stations of a model in the order of its modules, and why each other parameter has
    none."""
    stations: list[Station] = []
    reason: str | None
    left: dict[str, str] = {}
    inside: set[int] = set()  # modules that a fused one stands for
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        own = {k: p for k, p in module.named_parameters(recurse=False) if p.is_floating_point()}
        if _is(module, nn.MultiheadAttention):
            assert isinstance(module, nn.MultiheadAttention)
            stations.append(_attention(name, module))
            inside.add(id(module.out_proj))
            for local in ("bias_k", "bias_v"):
                if getattr(module, local) is not None:
                    left[_full(name, local)] = "no linear map has it for a parameter"
        elif own and not any(True for child in module.children() for _ in child.parameters()):
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                reason = "an embedding with max_norm is not linear in its weight"
                left |= {_full(name, k): reason for k in own}
            elif (reason := computed(module)) is not None:
                left |= {_full(name, k): reason for k in own}
            else:
                stations.append(Station(name, module, ((_leaf(name, module, own),),)))
        else:
            left |= {_full(name, k): "no linear map has it for a parameter" for k in own}
    held = {id(s.module.get_parameter(p.local)) for s in stations for x in s.sites for p in x.parts}
    named = dict(model.named_parameters(remove_duplicate=False))
    return stations, {n: why for n, why in left.items() if id(named[n]) not in held}


def _full(module: str, local: str) -> str:
    return f"{module}.{local}" if module else local


def _first_tensor(output: Any) -> Tensor:
    while isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError("no tensor comes out")
    return output


def _leaf(name: str, module: nn.Module, own: Mapping[str, Tensor]) -> Site:
    parts = tuple(Part(local, _full(name, local)) for local in own)
    shape = next(iter(own.values())).shape
    plain = _holds(module, own)
    if plain and _is(module, nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return Site(
            name, parts, _only_input, _projection,
            flat=True, known=True, width=shape[0], in_axis=-1,
        )  # fmt: skip
    if plain and _is(module, nn.Embedding):
        return Site(name, parts, _only_input, _embedding, flat=True, known=True, width=shape[1])

    def apply(inputs: tuple[tuple[Any, ...], Mapping[str, Any]], parameters: Parameters) -> Tensor:
        args, kwargs = inputs
        output = forward_with(module, parameters, args, kwargs)
        site.several |= isinstance(output, tuple | list)
        return _first_tensor(output)

    known = plain and _is(module, *_CHANNELS)
    dim = _CHANNELS[type(module)] if known else -1
    site = Site(name, parts, _all_inputs, apply, channel_dim=dim, known=known)
    return site


def _is(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether it is exactly of one of the classes, with the class' own forward."""
    return type(module) in kinds and "forward" not in vars(module)


def _holds(module: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Whether weight and bias are parameters and the layer has no others."""
    return "weight" in own and set(own) <= {"weight", "bias"}


def computed(module: nn.Module) -> str | None:
    """Why a module's weight is no parameter: another is computed before each call."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            return f"its weight is computed from it ({type(hook).__name__})"
    return None


def _only_input(call: Call) -> Tensor:
    z: Tensor = call.args[0] if call.args else next(iter(call.kwargs.values()))
    return wide(z)  # type: ignore[no-any-return]


def _all_inputs(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return wide(call.args), {k: wide(v) for k, v in call.kwargs.items()}


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
                flat=True, known=True, width=d, in_axis=-1,
            )
        )  # fmt: skip
    out = [Part("out_proj.weight", _full(name, "out_proj.weight"))]
    if module.out_proj.bias is not None:
        out.append(Part("out_proj.bias", _full(name, "out_proj.bias")))
    last = Site(
        _full(name, "out_proj"), tuple(out), _attention_output, _projection,
        flat=True, known=True, width=d, in_axis=-1,
    )  # fmt: skip
    return Station(name, module, (tuple(maps), (last,)))


def _attention_input(position: int) -> Callable[[Call], Tensor]:
    def inputs(call: Call) -> Tensor:
        word = ("query", "key", "value")[position]
        found = call.args[position] if len(call.args) > position else call.kwargs[word]
        return wide(found)  # type: ignore[no-any-return]

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
    return wide(forward_with(module, own, call.args, call.kwargs)[0])  # type: ignore[no-any-return]


def _projection(z: Tensor, parameters: Parameters) -> Tensor:
    bias = [v for k, v in parameters.items() if k.endswith("bias")]
    weight = next(v for k, v in parameters.items() if k.endswith("weight"))
    return F.linear(z, weight, bias[0] if bias else None)


@contextmanager
def hooked(stations: Sequence[Station], visit: Callable[[Station, Call], None]) -> Iterator[None]:
    """``visit`` is called before each call of a station."""

    def hook(station: Station) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            visit(station, Call(module, args, kwargs))

        return before

    with ExitStack() as hooks:
        for s in stations:
            handle = s.module.register_forward_pre_hook(hook(s), with_kwargs=True)
            hooks.callback(handle.remove)
        yield

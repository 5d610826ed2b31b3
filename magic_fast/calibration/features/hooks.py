"""FSC by hooks: h_0 + ξ·(h_m − h_0) at every layer, the base's weights kept beside the model.

Twice the weights and twice the work at inference: for comparison with the folded weights, which
give the same. Weights whose layer has no output of its own are folded here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.groups import Group
from magic_fast.calibration.features.sites import Call, Part, Site, Station, forward_with

Base = Callable[[str], Tensor]
Folded = Callable[[Site], Iterable[tuple[Part, Tensor]]]


def hook_station(station: Station, groups: Mapping[int, Group], base: Base, folded: Folded) -> None:
    """Calibrates the output of a station's module from now on.

    Args:
        groups: by the id of a site.
        base: name → the base's parameter.
        folded: a site → its calibrated parameters. What no output of a module shows (an expert's
            projections, weights that are used without a call) takes them from the start.
    """
    if station.observed or any(
        groups[id(site)].in_operations or site.several for site in station.sites
    ):
        for site in station.sites:
            for part, value in folded(site):
                part.cut(station.module.get_parameter(part.local).detach()).copy_(value)
        return
    if isinstance(station.module, nn.MultiheadAttention):
        station.module.register_forward_hook(_attention(station, groups, base), with_kwargs=True)
        return
    ((site,),) = station.stages
    factor = groups[id(site)].factor().float()
    own = {p.local: base(p.name) for p in site.parts}

    def calibrated(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        start = forward_with(module, own, args, kwargs)
        return _between(start, output, factor, site.channel_dim)

    station.module.register_forward_hook(calibrated, with_kwargs=True)


def _between(start: Tensor, end: Tensor, factor: Tensor, dim: int) -> Tensor:
    if factor.dim():
        shape = [1] * end.dim()
        shape[dim] = -1
        factor = factor.view(shape)
    return start + factor.to(end) * (end - start)


def _attention(station: Station, groups: Mapping[int, Group], base: Base) -> Any:
    """Queries, keys and values calibrated as features, attended to by a module whose projections
    are identities, and the out-projection calibrated as a feature."""
    (q, k, v), (out,) = station.stages

    def mapped(site: Site, module: nn.Module, z: Tensor) -> Tensor:
        merged = {p.local: p.cut(module.get_parameter(p.local)) for p in site.parts}
        start = site.apply(z, {p.local: p.cut(base(p.name)) for p in site.parts})
        factor = groups[id(site)].factor().float()
        return _between(start, site.apply(z, merged), factor, -1)

    def calibrated(
        module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call = Call(module, args, kwargs)
        query, key, value = (mapped(site, module, site.inputs(call)) for site in (q, k, v))
        one = torch.eye(module.embed_dim, dtype=query.dtype, device=query.device)
        own: dict[str, Tensor] = {"out_proj.weight": one}
        if module._qkv_same_embed_dim:
            own["in_proj_weight"] = one.repeat(3, 1)
        else:
            own |= {f"{which}_proj_weight": one for which in "qkv"}
        if module.in_proj_bias is not None:
            own["in_proj_bias"] = torch.zeros_like(module.in_proj_bias)
        if module.out_proj.bias is not None:
            own["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
        rest = {k: x for k, x in kwargs.items() if k not in ("query", "key", "value")}
        heads, weights = forward_with(module, own, (query, key, value, *args[3:]), rest)
        return mapped(out, module, heads), weights

    return calibrated

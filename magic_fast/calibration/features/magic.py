"""FSC as the authors' code does it (preset ``magic``): for comparison with their results only.

Every leaf module, even without parameters, and whole attentions; ratios of single positions, some
of them kept per position, so that nothing can be folded; NaN → 1, infinities stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.batches import batches_of, run_batch, to_device
from magic_fast.calibration.features.sites import forward_with
from magic_fast.errors import InputError


@dataclass
class MagicLayer:
    """A hooked module: its ratio of every task, and what is applied."""

    name: str
    module: nn.Module
    by_task: dict[str, Tensor] = field(default_factory=dict)
    ratio: Tensor = field(default_factory=lambda: torch.ones(()))

    def settle(self, sensitive: Sequence[str] | None) -> None:
        if self.by_task:
            ratio = torch.stack(list(self.by_task.values())).mean(0)
            self.ratio = torch.where(torch.isnan(ratio), 1.0, ratio)
        if any(self.name in entry for entry in sensitive or ()):
            self.ratio = self.ratio.clamp(max=1.0)


def _hooked_modules(model: nn.Module) -> Iterator[MagicLayer]:
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside |= {id(m) for m in module.modules()}
            yield MagicLayer(name, module)
        elif not any(True for _ in module.children()):
            yield MagicLayer(name, module)


def _reduce(name: str, fused: bool, feature: tuple[Tensor, Tensor], p: float) -> Tensor:
    dims = feature[0].dim()
    if dims == 4:
        feature = feature[0].flatten(-2), feature[1].flatten(-2)
    own, merged = (torch.linalg.vector_norm(f, ord=p, dim=-1) for f in feature)
    ratio: Tensor = own / merged
    if dims not in (2, 3, 4) or (dims == 2 and "ln_" not in name and "attn" in name):
        raise InputError(
            f"feature of '{name}': expected 2 to 4 dimensions (3 or 4 in an attention) under "
            f"preset 'magic', got {dims}. Leave the preset out."
        )
    if dims == 2 or "ln_" in name:
        return ratio.mean()
    if dims == 3 and not fused:
        ratio = ratio.transpose(0, 1)
    return ratio.mean(1 if "attn" in name else 0)


def calibrate_like_magic(
    model: nn.Module,
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    data: Mapping[str, Any],
    *,
    p: float,
    sensitive: Sequence[str] | None,
) -> list[MagicLayer]:
    """Hooks ``model`` so that it runs calibrated, and returns what was found. One set of data is
    for the first expert alone."""
    layers = list(_hooked_modules(model))
    device = next((x.device for x in model.parameters()), torch.device("cpu"))

    def state(layer: MagicLayer, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
        start = f"{layer.name}." if layer.name else ""
        names = [n for n, _ in layer.module.named_parameters()]
        return {n: of[start + n].to(device) for n in names}

    for task, expert in zip(data, experts, strict=False):
        handles = []
        for layer in layers:

            def measure(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                layer: MagicLayer = layer,
                expert: Mapping[str, Tensor] = expert,
                task: str = task,
            ) -> None:
                start = _output(forward_with(module, state(layer, base), args, kwargs))
                own = _output(forward_with(module, state(layer, expert), args, kwargs)) - start
                fused = isinstance(module, nn.MultiheadAttention)
                found = _reduce(layer.name, fused, (own, _output(output) - start), p)
                layer.by_task[task] = found

            handles.append(layer.module.register_forward_hook(measure, with_kwargs=True))
        with torch.no_grad():
            for number, batch in enumerate(batches_of(data, task)):
                run_batch(model, to_device(batch, device), task, number)
        for handle in handles:
            handle.remove()
    for layer in layers:
        layer.settle(sensitive)
        _deploy(layer, state(layer, base))
    return layers


def _output(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value  # type: ignore[no-any-return]


def _deploy(layer: MagicLayer, base: Mapping[str, Tensor]) -> None:
    ratio = layer.ratio[..., None, None]

    def calibrated(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        start = _output(forward_with(module, base, args, kwargs))
        value = start + ratio * (_output(output) - start)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    layer.module.register_forward_hook(calibrated, with_kwargs=True)

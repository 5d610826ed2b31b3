"""Whether a replacement does in this release of PEFT what it replaces: signatures, then both on
something small. So a release that is not known here is served where it is unchanged."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.integrations.peft import functions, svd

_GENERATOR_SEED = 0
_TOLERANCE = 1e-5  # of values of order 1 in float32


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    plain = inspect.unwrap(function, stop=lambda f: not hasattr(f, "__wrapped__"))
    return [(p.name, p.default) for p in inspect.signature(plain).parameters.values()]


def _same_call(own: Callable[..., Any], ours: Callable[..., Any]) -> bool:
    """Arguments, order and defaults; ``functools.wraps`` shows PEFT's, so ours is looked at by
    itself."""
    code = inspect.signature(ours, follow_wrapped=False)
    return [(p.name, p.default) for p in code.parameters.values()] == _parameters(own)


def _samples() -> Mapping[str, tuple[Any, ...]]:
    """Arguments of each function that is not random, without ties."""
    generator = torch.Generator().manual_seed(_GENERATOR_SEED)
    tensors = [torch.randn(5, 7, generator=generator) for _ in range(3)]
    weights, stack = torch.tensor([0.5, -1.0, 2.0]), torch.stack(tensors)
    mask = stack > 0.3
    return {
        "task_arithmetic": (tensors, weights),
        "magnitude_prune": (tensors, weights, 0.4),
        "ties": (tensors, weights, 0.4, "frequency"),
        "magnitude_based_pruning": (tensors[0], 0.4),
        "prune": (tensors[0], 0.4, "magnitude"),
        "calculate_majority_sign_mask": (stack, "total"),
        "disjoint_merge": (stack, mask),
        # random trims that keep everything
        "random_pruning": (tensors[0], 1.0, True),
        "dare_linear": (tensors, weights, 1.0),
        "dare_ties": (tensors, weights, 1.0, "total"),
    }


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=_TOLERANCE, atol=_TOLERANCE
    )  # fmt: skip


def differing() -> dict[str, str]:
    """name → why its replacement does not fit this release."""
    found = {}
    for name, arguments in _samples().items():
        if name not in functions.OWN:
            found[name] = "it has none"
        elif not _same_call(functions.OWN[name], functions.OURS[name]):
            found[name] = "other arguments"
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own, ours = functions.OWN[name](*arguments), functions.OURS[name](*arguments)
            if not _agree(own, ours):
                found[name] = "other results"
    return found


def scaling_power() -> int | str:
    """How often this release's svd applies the scaling of an adapter, or why the low-rank route
    does not fit it."""
    if svd.OWN is None:
        return "it has none"
    if not _same_call(svd.OWN, svd.replacement(1)):
        return "other arguments"
    import peft

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(_GENERATOR_SEED)
        config = peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False
        )  # a scaling of 3
        model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config, adapter_name="a")
        model.add_adapter("b", config)
    target: Any = model.base_model.model[0]
    rest = (target.lora_A["a"].weight, target.lora_B["a"].weight, None, "total")
    given = ("svd", ["a", "b"], [0.5, -1.0], 2, target, *rest)
    with torch.no_grad():
        down, up = svd.OWN(model.base_model, *given)
        for power in (1, 2):
            own_down, own_up = svd.replacement(power)(model.base_model, *given)
            if _agree(up @ down, own_up @ own_down):
                return power
    return "other results"

"""The functions of ``peft.utils.merge_utils`` on the fused merge: same arguments, same dtypes.

What the fused merge does not take (gradients wanted, float64, quantised or mixed tensors, NaN and
infinity, a density outside (0, 1)) goes to PEFT's own function, which knows what it means by it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.utils import merge_utils
from torch import Tensor

from magic_fast.api.tensors.merge import merge_task_vectors
from magic_fast.errors import NonFiniteError

Function = Callable[..., Any]

#: PEFT's functions by name, as they were when this file was first imported.
OWN: Mapping[str, Function] = {
    name: value
    for name, value in vars(merge_utils).items()
    if callable(value) and getattr(value, "__module__", "") == merge_utils.__name__
}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def _takes(tensors: Sequence[Any]) -> bool:
    """Whether the fused merge has these: plain tensors of one shape, dtype and device."""
    if not all(type(t) in _PLAIN for t in tensors):
        return False
    like = tensors[0]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return (
        not wanted
        and like.dim() > 0
        and like.dtype in _DTYPES
        and like.device.type in ("cpu", "cuda")
        and like.numel() > 0
        and all(
            (t.dtype, t.shape, t.device, t.layout)
            == (like.dtype, like.shape, like.device, torch.strided)
            for t in tensors
        )
    )


def _takes_weights(weights: Any, count: int) -> bool:
    return (
        type(weights) is Tensor
        and weights.shape == (count,)
        and weights.dtype != torch.bool
        and not weights.is_complex()
        and not (torch.is_grad_enabled() and weights.requires_grad)
        and all(math.isfinite(w) for w in weights.tolist())
    )


def _is_density(density: Any) -> bool:
    return isinstance(density, int | float) and 0 < density


def _seed() -> int:
    """From PyTorch's generator, so that ``torch.manual_seed`` repeats a random trim."""
    return int(torch.randint(2**63 - 1, ()))


def _warn(density: float, times: int) -> None:
    for _ in range(times):
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.",
            stacklevel=4,
        )


def _fused(
    method: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    dtype: torch.dtype,
    **parameters: Any,
) -> Tensor | None:
    """The merge in that dtype; None where a NaN, an infinity or an overflow is to come out."""
    out = torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device)
    try:
        merge_task_vectors(
            [t.detach().contiguous() for t in tensors], method, preset="peft",
            weights=weights, out=out, **parameters,
        )  # fmt: skip
    except NonFiniteError:
        return None
    return out


def _combined(
    method: str, task_tensors: Sequence[Tensor], weights: Tensor, density: Any = 1.0, **how: Any
) -> Tensor | None:
    """What the five functions over experts share; None: to be left to PEFT's own."""
    tensors = list(task_tensors)
    if not tensors or not _takes(tensors) or not _takes_weights(weights, len(tensors)):
        return None
    if not _is_density(density):
        return None
    dtype = torch.promote_types(tensors[0].dtype, weights.dtype)
    if method in ("ties", "dare_ties"):  # divided by a count, which has the default dtype
        dtype = torch.promote_types(dtype, torch.get_default_dtype())
    if dtype not in _DTYPES:
        return None
    if method != "task_arithmetic":
        if density >= 1:
            _warn(density, len(tensors))
        how["density"] = min(float(density), 1.0)
    if method.startswith("dare"):
        how["seed"] = _seed()
    return _fused(method, tensors, [float(w) for w in weights.tolist()], dtype, **how)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    merged = _combined("task_arithmetic", task_tensors, weights)
    return OWN["task_arithmetic"](task_tensors, weights) if merged is None else merged


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    merged = _combined("magnitude_prune", task_tensors, weights, density)
    return OWN["magnitude_prune"](task_tensors, weights, density) if merged is None else merged


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    merged = _combined("dare_linear", task_tensors, weights, density)
    return OWN["dare_linear"](task_tensors, weights, density) if merged is None else merged


def ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    return _voted("ties", task_tensors, weights, density, majority_sign_method)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    return _voted("dare_ties", task_tensors, weights, density, majority_sign_method)


def _voted(method: str, tensors: list[Tensor], weights: Tensor, density: float, how: str) -> Tensor:
    merged = None
    if how in ("total", "frequency"):
        merged = _combined(method, tensors, weights, density, vote=how)
    return OWN[method](tensors, weights, density, how) if merged is None else merged


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    pruned = None
    if _takes([tensor]) and _is_density(density) and density <= 1:
        pruned = _fused("magnitude_prune", [tensor], [1.0], tensor.dtype, density=float(density))
    return OWN["magnitude_based_pruning"](tensor, density) if pruned is None else pruned


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    pruned = None
    if _takes([tensor]) and _is_density(density) and density <= 1:
        pruned = _fused(
            "dare_linear", [tensor], [1.0], tensor.dtype, density=float(density), seed=_seed(),
            rescale="keep_probability" if rescale else "none",
        )  # fmt: skip
    return OWN["random_pruning"](tensor, density, rescale) if pruned is None else pruned


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    if density >= 1:
        _warn(density, 1)
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"Unknown method {method}")


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Expert by expert into the mask: no second stack is held."""
    own = OWN["calculate_majority_sign_mask"]
    if method not in ("total", "frequency") or not _takes([tensor]):
        return own(tensor, method)  # type: ignore[no-any-return]
    mass = (tensor if method == "total" else tensor.sign()).sum(dim=0)
    if bool(mass.min().isnan()):
        return own(tensor, method)  # type: ignore[no-any-return]
    positive = mass >= 0
    mask = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
    for values, agrees in zip(tensor, mask, strict=True):
        torch.gt(values, 0, out=agrees)
        agrees.eq_(positive).logical_and_(values != 0)
    return mask


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    mask, total = majority_sign_mask, None
    if _takes([task_tensors]) and mask.dtype == torch.bool and mask.shape == task_tensors.shape:
        total = _fused(
            "dare_linear", list(task_tensors), [1.0] * len(mask), task_tensors.dtype,
            density=1.0, masks=list(mask.contiguous()),
        )  # fmt: skip
    if total is None:
        return OWN["disjoint_merge"](task_tensors, mask)  # type: ignore[no-any-return]
    narrow = torch.uint8 if len(mask) < 256 else torch.int32
    count = torch.zeros(total.shape, dtype=narrow, device=mask.device)
    for agrees in mask:
        count += agrees
    return total / count.to(torch.get_default_dtype()).clamp_(min=1.0)


#: Ours by PEFT's names, with its signatures and docstrings.
OURS: Mapping[str, Function] = {
    f.__name__: functools.wraps(OWN[f.__name__])(f) if f.__name__ in OWN else f
    for f in (
        magnitude_based_pruning, random_pruning, prune, calculate_majority_sign_mask,
        disjoint_merge, task_arithmetic, magnitude_prune, ties, dare_linear, dare_ties,
    )
}  # fmt: skip

#: PEFT's that stay: a view costs nothing.
LEFT = ("reshape_weight_task_tensors",)

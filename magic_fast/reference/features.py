"""Feature space calibration (FSC) in plain PyTorch: from features to ξ (docs/calibration.md).

For a layer that is linear in its own parameters, h_k − h_0 is what the layer gives with the task
vector τ_k for parameters; so no difference of two large activations is ever taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def magnitudes(feature: Tensor, p: float, *, per_channel: bool = False) -> Tensor:
    """‖·‖_p of every position of ``feature`` [positions, channels], float64 [positions]; for each
    channel by itself |·| [positions, channels].

    >>> magnitudes(torch.tensor([[3.0, -4.0]]), 1).item()
    7.0
    """
    if per_channel:
        return feature.abs().double()
    found: Tensor = torch.linalg.vector_norm(feature, ord=p, dim=-1, dtype=torch.float64)
    return found


class Ratios:
    """ξ of one layer and one task, gathered over batches: Σ‖h_k − h_0‖ / Σ‖h_m − h_0‖, or the mean
    or median of the ratios of single positions.

    >>> r = Ratios("ratio_of_sums")
    >>> r.add(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
    >>> r.coefficient().item()
    2.0
    """

    def __init__(self, reduction: str, min_denominator: float = 0.0) -> None:
        self._reduction = reduction
        self._floor = min_denominator
        self._sums: tuple[Tensor, Tensor] | None = None
        self._ratios: list[Tensor] = []
        self.positions = 0

    def add(self, own: Tensor, merged: Tensor) -> None:
        """Magnitudes of an expert's and of the merged task feature, both [positions] or
        [positions, channels]."""
        self.positions += own.shape[0]
        if self._reduction == "ratio_of_sums":
            upper, lower = own.sum(0).cpu(), merged.sum(0).cpu()
        else:
            floor = merged.mean(0) * self._floor
            counts = (merged > 0) & (merged >= floor)
            ratio = torch.where(counts, own / merged, math.nan)
            if self._reduction == "median":
                self._ratios.append(ratio.float().cpu())
                return
            upper, lower = ratio.nansum(0).cpu(), counts.sum(0).double().cpu()
        if self._sums is not None:
            upper, lower = self._sums[0] + upper, self._sums[1] + lower
        self._sums = upper, lower

    def coefficient(self) -> Tensor:
        """ξ, float64 [] or [channels]; NaN where it is undefined (the merged feature is the
        base's)."""
        if self._reduction == "median" and self._ratios:
            return torch.cat(self._ratios).nanmedian(0).values.double()
        if self._sums is None:
            return torch.tensor(math.nan, dtype=torch.float64)
        upper, lower = self._sums
        return torch.where(lower > 0, upper / lower, math.nan)


def mean_over_tasks(coefficients: Sequence[Tensor]) -> Tensor:
    """Mean over the tasks where ξ is finite; NaN where it is for none.

    >>> mean_over_tasks([torch.tensor(2.0), torch.tensor(math.nan)]).item()
    2.0
    """
    stacked = torch.stack([c.double() for c in coefficients])
    finite = torch.isfinite(stacked)
    total = torch.where(finite, stacked, 0.0).sum(0)
    return torch.where(finite.any(0), total / finite.sum(0), math.nan)


def applied(
    coefficient: Tensor,
    *,
    sensitive: bool = False,
    strength: float = 1.0,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """What a raw ξ becomes, in this order: undefined → 1, sensitive → min(ξ, 1), ξ^strength,
    clamp.

    >>> applied(torch.tensor([math.nan, 3.0]), clamp=(0.5, 2.0)).tolist()
    [1.0, 2.0]
    """
    value = torch.where(torch.isfinite(coefficient), coefficient, 1.0)
    undefined = value != coefficient
    if sensitive:
        value = value.clamp(max=1.0)
    value = value.pow(strength)
    if clamp is not None:
        value = torch.where(undefined, value, value.clamp(*clamp))
    return value


def fold(base: Tensor, merged: Tensor, factor: Tensor, axis: int | None = None) -> Tensor:
    """base + factor·(merged − base), computed in float32 (float64 for float64) and rounded once to
    the dtype of ``merged``; where the factor is 1, ``merged`` to the bit.

    Args:
        factor: one number, or one for each index of ``axis``.

    >>> fold(torch.zeros(2), torch.ones(2), torch.tensor(0.5))
    tensor([0.5000, 0.5000])
    """
    dtype = torch.promote_types(merged.dtype, torch.float32)
    factor = factor.to(merged.device, torch.float32).to(dtype)
    if factor.dim():
        assert axis is not None
        factor = factor.view([-1 if a == axis else 1 for a in range(merged.dim())])
    start = base.to(merged.device, dtype)
    moved = start + factor * (merged.to(dtype) - start)
    return torch.where(factor == 1, merged, moved.to(merged.dtype))

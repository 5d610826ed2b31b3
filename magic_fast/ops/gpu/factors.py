"""What each expert is multiplied by, on the device: norms restored after a trim, an alignment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from magic_fast.ops.gpu.jobs import Device
from magic_fast.ops.gpu.numbers import ABOVE, KEEP_ALL
from magic_fast.recipe import Align, Rescale

_POWERS = {Rescale.L1: 1, Rescale.L2: 2, Rescale.LINF: 0}  # 0: the largest
_TINY_NORM = 1e-7  # below it a norm is not restored


def find_factors(d: Device, norm_sums: Callable[[Device, int], Tensor]) -> None:
    """Into the device's numbers.

    Args:
        norm_sums: float64 [programs, K, 2] sums of |τ|^power before and after the trim of experts
            that lose something (power 0: the largest |τ|).
    """
    recipe, k = d.job.recipe, len(d.experts)
    if recipe.restores and any(kind != KEEP_ALL for kind in d.numbers.kinds):
        power = _POWERS[recipe.rescale]
        d.floats[:k] = _restored(norm_sums(d, power), power)
    if recipe.align is not Align.NONE:
        _align(d, norm_sums(_whole(d), 2)[..., 0])


def _whole(d: Device) -> Device:
    """The job as if a trim kept everything: sums over its trimmed values are over whole ones."""
    k = len(d.experts)
    integers = d.integers.clone()
    integers[:k], integers[k : 2 * k] = 0, d.job.offset + d.n  # LOW and CUT of ABOVE
    return replace(d, numbers=replace(d.numbers, kinds=(ABOVE,) * k), integers=integers)


def _align(d: Device, squares: Tensor) -> None:
    """The factors × smallest length other than 0 ÷ own length, in place. ``squares``: float64
    [programs, K] sums of τ²."""
    own = squares.sum(0).sqrt()
    shortest = torch.where(own > 0, own, torch.inf).amin()
    factors = d.floats[: len(d.experts)]
    shorter = (factors.double() * shortest / own).float()
    factors.copy_(torch.where((own == 0) | (own == shortest), factors, shorter))


def _restored(partial: Tensor, power: int) -> Tensor:
    """factor float32 [K] = norm before ÷ norm after the trim, from ``partial`` float64
    [programs, K, 2] sums of |τ|^power (0: the largest |τ|)."""
    sums = partial.amax(0) if power == 0 else partial.sum(0)
    before, after = (sums.sqrt() if power == 2 else sums).unbind(1)
    usable = (before >= _TINY_NORM) & (after >= _TINY_NORM)
    return torch.where(usable, before / after, torch.ones_like(before)).float()

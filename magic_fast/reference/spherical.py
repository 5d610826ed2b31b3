"""Spherical interpolation in plain PyTorch (docs/methods.md)."""

from __future__ import annotations

import torch
from torch import Tensor

_NEARLY_PARALLEL = 0.9995  # above it slerp is plain interpolation (mergekit, FusionBench)
_NOT_NORMALISED = 1e-8  # a vector this short keeps its length, so its cosine is about 0
_TINY_SINE = 1e-6  # the MAGIC authors' bound


def _sum(x: Tensor, per_row: bool) -> Tensor:
    return x.double().sum(-1, keepdim=True) if per_row else x.double().sum()


def slerp(a: Tensor, b: Tensor, t: float, *, per_row: bool = False) -> Tensor:
    """[sin((1−t)ω)·a + sin(tω)·b] / sin ω with ω the angle between a and b; a + t(b − a) where
    |cos ω| > 0.9995.

    Args:
        a, b: float32 or float64, same shape; whole weights or task vectors.
        t: 0 gives a, 1 gives b.
        per_row: one angle per vector along the last dimension instead of one per tensor.

    Returns:
        Same shape and dtype as ``a``; the angle is computed in float64.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.7071, 0.7071])
    """
    norm_a, norm_b = _sum(a * a.double(), per_row).sqrt(), _sum(b * b.double(), per_row).sqrt()
    one = torch.ones_like(norm_a)
    length = torch.where(norm_a > _NOT_NORMALISED, norm_a, one) * torch.where(
        norm_b > _NOT_NORMALISED, norm_b, one
    )
    cosine = (_sum(a.double() * b, per_row) / length).clamp(-1, 1)
    omega = torch.acos(cosine)
    sine = torch.sin(omega)
    straight = cosine.abs() > _NEARLY_PARALLEL
    safe = torch.where(straight, one, sine)
    weight_a = torch.where(straight, (1 - t) * one, torch.sin((1 - t) * omega) / safe)
    weight_b = torch.where(straight, t * one, torch.sin(t * omega) / safe)
    return a * weight_a.to(a.dtype) + b * weight_b.to(b.dtype)


def slerp_magic(a: Tensor, b: Tensor) -> Tensor:
    """The MAGIC authors' rule: per vector along the last dimension, t = ½, plain mean where |sin
    ω| < 1e-6; a zero vector gives NaN."""
    norms = a.double().norm(dim=-1, keepdim=True), b.double().norm(dim=-1, keepdim=True)
    cosine = ((a / norms[0]) * (b / norms[1])).sum(-1, keepdim=True).clamp(-1, 1)
    omega = torch.acos(cosine)
    sine = torch.sin(omega)
    weight = torch.where(
        sine.abs() < _TINY_SINE, 0.5 * torch.ones_like(sine), torch.sin(omega / 2) / sine
    )
    return (a + b) * weight.to(a.dtype)

"""Spherical interpolation in plain PyTorch, from inner products (docs/methods.md)."""

from __future__ import annotations

import torch
from torch import Tensor

_NEARLY_PARALLEL = 0.9995  # above it slerp is plain interpolation (mergekit, FusionBench)
_NOT_NORMALISED = 1e-8  # a vector this short keeps its length, so its cosine is about 0
_TINY_SINE = 1e-6  # the MAGIC authors' bound


def _norms(gram: Tensor) -> tuple[Tensor, Tensor]:
    a, b = gram.diagonal(dim1=-2, dim2=-1).sqrt().unbind(-1)
    return a, b


def slerp(gram: Tensor, t: float) -> Tensor:
    """[sin((1−t)ω), sin(tω)] / sin ω with ω the angle between two vectors; [1 − t, t] where
    |cos ω| > 0.9995.

    Args:
        gram: float64 [..., 2, 2], inner products of whole weights or of task vectors.
        t: 0 gives the first, 1 the second.

    Returns:
        float64 [..., 2].

    >>> slerp(torch.eye(2, dtype=torch.float64), 0.5)
    tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    norm_a, norm_b = _norms(gram)
    one = torch.ones_like(norm_a)
    length = torch.where(norm_a > _NOT_NORMALISED, norm_a, one) * torch.where(
        norm_b > _NOT_NORMALISED, norm_b, one
    )
    cosine = (gram[..., 0, 1] / length).clamp(-1, 1)
    omega = torch.acos(cosine)
    straight = cosine.abs() > _NEARLY_PARALLEL
    safe = torch.where(straight, one, torch.sin(omega))
    shares = [
        torch.where(straight, share * one, torch.sin(share * omega) / safe) for share in (1 - t, t)
    ]
    return torch.stack(shares, dim=-1)


def slerp_magic(gram: Tensor) -> Tensor:
    """The MAGIC authors' rule, t = ½: plain mean where |sin ω| < 1e-6; a zero vector gives NaN."""
    norm_a, norm_b = _norms(gram)
    omega = torch.acos((gram[..., 0, 1] / (norm_a * norm_b)).clamp(-1, 1))
    sine = torch.sin(omega)
    share = torch.where(
        sine.abs() < _TINY_SINE, 0.5 * torch.ones_like(sine), torch.sin(omega / 2) / sine
    )
    return torch.stack([share, share], dim=-1)

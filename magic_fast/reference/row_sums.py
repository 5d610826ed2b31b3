"""Sums of the rows of task vectors and of a merged change, in float64: the Gram matrix
G_jk = ⟨τ_j, τ_k⟩, dots b_k = ⟨τ_k, d⟩ and s = ‖d‖², and sums of other powers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22  # rows are taken in blocks of about this many elements


@dataclass
class RowStats:
    """Sums of every row. ``gram`` [rows, K, K], ``dots`` [rows, K], ``norm2`` [rows], all float64.

    ``norms`` [rows, K] and ``merged_norm`` [rows] hold p-norms where ``p`` is not 2 (``None``
    otherwise); for finite p they are sums of |x|^p, so that tensors add up.
    """

    gram: Tensor
    dots: Tensor
    norm2: Tensor
    powers: Tensor | None = None
    merged_powers: Tensor | None = None


def row_view(x: Tensor, axes: Sequence[int] = (0,)) -> Tensor:
    """[rows, cols] view: ``axes`` first and flattened, the rest behind; a 1-D tensor is [n, 1].

    >>> row_view(torch.zeros(4, 3, 2)).shape
    torch.Size([4, 6])
    """
    front = [a % x.dim() for a in axes]
    back = [a for a in range(x.dim()) if a not in front]
    rows = math.prod(x.shape[a] for a in front)
    return x.permute(*front, *back).reshape(rows, -1) if x.numel() else x.reshape(rows, 0)


def power_sums(x: Tensor, p: float) -> Tensor:
    """Σ|x|^p over the last axis; max |x| where p is infinite."""
    magnitude = x.abs()
    if p == math.inf:
        return magnitude.amax(-1) if x.shape[-1] else magnitude.sum(-1)
    return magnitude.pow(p).sum(-1)


def row_stats(taus: Sequence[Tensor], delta: Tensor, p: float = 2) -> RowStats:
    """Sums of the rows of K task vectors and of ``delta``, all [rows, cols], accumulated in
    float64."""
    rows, cols = delta.shape
    k = len(taus)
    double = torch.float64
    gram = torch.empty(rows, k, k, dtype=double, device=delta.device)
    dots = torch.empty(rows, k, dtype=double, device=delta.device)
    norm2 = torch.empty(rows, dtype=double, device=delta.device)
    powers = merged_powers = None
    if p != 2:
        powers, merged_powers = torch.empty_like(dots), torch.empty_like(norm2)
    step = max(1, _BLOCK_ELEMENTS // max(1, cols * (k + 1)))
    for r in range(0, rows, step):
        block = slice(r, min(rows, r + step))
        t = torch.stack([x[block] for x in taus], dim=1).to(double)  # [rows, K, cols]
        d = delta[block].to(double)
        torch.matmul(t, t.transpose(1, 2), out=gram[block])
        dots[block] = torch.matmul(t, d.unsqueeze(-1)).squeeze(-1)
        norm2[block] = d.square().sum(-1)
        if powers is not None and merged_powers is not None:
            powers[block], merged_powers[block] = power_sums(t, p), power_sums(d, p)
    return RowStats(gram, dots, norm2, powers, merged_powers)


def whole_tensor(stats: RowStats, p: float) -> RowStats:
    """The same sums with the whole tensor as one row."""

    def add(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if p == math.inf:
            return x.amax(0, keepdim=True) if x.shape[0] else x.sum(0, keepdim=True)
        return x.sum(0, keepdim=True)

    return RowStats(
        stats.gram.sum(0, keepdim=True),
        stats.dots.sum(0, keepdim=True),
        stats.norm2.sum(0, keepdim=True),
        add(stats.powers),
        add(stats.merged_powers),
    )

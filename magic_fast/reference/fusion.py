"""Two models, element by element: Arcee Fusion (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from magic_fast.reference.trim import kth_magnitude

_SMALL_PROBABILITY = 1e-8


def importance(a: Tensor, b: Tensor) -> Tensor:
    """|b−a|·KL with KL = Σ p·(ln p − ln q) per last-dimension vector, p and q the softmax of b
    and a, each plus 1e-8. A 1-D tensor has one KL, a scalar none (0)."""
    if a.dim() == 0:
        return torch.zeros_like(a)
    p = torch.softmax(b, dim=-1) + _SMALL_PROBABILITY
    q = torch.softmax(a, dim=-1) + _SMALL_PROBABILITY
    divergence = (p * (torch.log(p) - torch.log(q))).sum(-1, keepdim=True)
    return (b - a).abs() * divergence


def arcee_fusion(
    a: Tensor, b: Tensor, kth: Callable[[Tensor, int], float] = kth_magnitude
) -> Tensor:
    """b where its importance reaches Q(½) + 1.5·(Q(¾) − Q(¼)), a elsewhere.

    Q(u) is the importance at index ⌊u·(n−1)⌋ in ascending order, exactly (mergekit 0.1.5 samples
    above a million elements).

    Args:
        a, b: base and expert, float32 or float64, same shape.
        kth: what finds the k-th largest magnitude.
    """
    if not a.numel():
        return a.clone()
    scores = importance(a, b)
    if a.dim() == 1 and float(scores.max()) > 0:
        # The one KL is a factor of both sides of the comparison. Without it the differences of
        # 16-bit weights compare exactly, and equality does not hang on the rounding of a sum.
        scores = (b - a).abs().double()
    flat = scores.flatten()
    n = flat.numel()

    positive = flat.clamp(min=0)  # rounding leaves some divergences just below 0

    def quantile(u: float) -> Tensor:
        index = int(torch.tensor(u, dtype=torch.float32).double() * (n - 1))
        found = kth(positive, n - index)
        return flat.new_tensor(found) if found > 0 else torch.kthvalue(flat, index + 1).values

    threshold = quantile(0.5) + 1.5 * (quantile(0.75) - quantile(0.25))
    return torch.where(scores >= threshold, b, a)

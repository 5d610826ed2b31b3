"""Two models, element by element: Arcee Fusion (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from magic_fast.reference.trim import kth_magnitude

_SMALL_PROBABILITY = 1e-8
_PIECE = 1 << 18  # elements of whose rows the dozen steps stay in a CPU's caches


def importance(a: Tensor, b: Tensor) -> Tensor:
    """|b−a|·KL with KL = Σ p·(ln p − ln q) per last-dimension vector, p and q the softmax of b
    and a, each plus 1e-8. A 1-D tensor has one KL, a scalar none (0)."""
    if a.dim() == 0:
        return torch.zeros_like(a)
    p = torch.softmax(b, dim=-1) + _SMALL_PROBABILITY
    q = torch.softmax(a, dim=-1) + _SMALL_PROBABILITY
    divergence = (p * (torch.log(p) - torch.log(q))).sum(-1, keepdim=True)
    return (b - a).abs() * divergence


def _importances(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``importance`` in ``dtype``, some rows at a time on a CPU: the same bits, and no temporary
    is as large as the tensor."""
    if a.dim() < 2:
        return importance(a.to(dtype), b.to(dtype))
    rows = [x.reshape(-1, x.shape[-1]) for x in (a, b)]
    scores = torch.empty(rows[0].shape, dtype=dtype, device=a.device)
    # two rows at least: of a row alone the threads would share the sum, in another order
    of_piece = max(2, _PIECE // a.shape[-1])
    pieces = max(1, len(scores) // of_piece) if a.device.type == "cpu" else 1
    for x, y, to in zip(*(t.tensor_split(pieces) for t in (*rows, scores)), strict=True):
        to.copy_(importance(x.to(dtype), y.to(dtype)))
    return scores.view(a.shape)


def arcee_fusion(
    a: Tensor,
    b: Tensor,
    kth: Callable[[Tensor, int], float] = kth_magnitude,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """b where its importance reaches Q(½) + 1.5·(Q(¾) − Q(¼)), a elsewhere.

    Q(u) is the importance at index ⌊u·(n−1)⌋ in ascending order, exactly (mergekit 0.1.5 samples
    above a million elements).

    Args:
        a, b: base and expert, same shape.
        kth: what finds the k-th largest magnitude.
        dtype: of the arithmetic and of the result, float32 or float64; ``a``'s own by default.
    """
    dtype = dtype or a.dtype
    if not a.numel():
        return a.to(dtype, copy=True)
    scores = _importances(a, b, dtype)
    if a.dim() == 1 and float(scores.max()) > 0:
        # The one KL is a factor of both sides of the comparison. Without it the differences of
        # 16-bit weights compare exactly, and equality does not hang on the rounding of a sum.
        scores = (b.to(dtype) - a.to(dtype)).abs().double()
    flat = scores.flatten()
    n = flat.numel()

    positive = flat.clamp(min=0)  # rounding leaves some divergences just below 0

    def quantile(u: float) -> Tensor:
        index = int(torch.tensor(u, dtype=torch.float32).double() * (n - 1))
        found = kth(positive, n - index)
        return flat.new_tensor(found) if found > 0 else torch.kthvalue(flat, index + 1).values

    threshold = quantile(0.5) + 1.5 * (quantile(0.75) - quantile(0.25))
    return torch.where(scores >= threshold, b, a).to(dtype)

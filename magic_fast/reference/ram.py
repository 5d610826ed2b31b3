"""RAM and RAM+, reinforced agent merging: means over the experts that moved an element (Yuan et
al., arXiv 2601.13572; docs/methods.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _movers(taus: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """[|δ_k| > ε] of each expert, and how many there are per element (int16)."""
    moved = [t.abs() > epsilon for t in taus]
    count = torch.zeros(taus[0].shape, dtype=torch.int16, device=taus[0].device)
    for m in moved:
        count += m
    return moved, count


def ram(
    taus: Sequence[Tensor],
    epsilon: float = 1e-5,
    *,
    r: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """Mean of the task vectors over the experts that moved an element by more than ε; 0 where none
    did.

    RAM+ (``r`` > 0) enlarges what only one expert moved by 1 + r·clamp(shared_k ÷ max(unique_k,
    ε), 0, alpha), where unique_k and shared_k count the elements that expert k moved alone and
    together with others.

    Args:
        taus: K task vectors, float32 or float64.
        epsilon: moves up to this size are noise.
        r, alpha: of RAM+.

    >>> ram([torch.tensor([2.0, 0.0, 4.0]), torch.tensor([0.0, 0.0, 2.0])])
    tensor([2., 0., 3.])
    """
    moved, count = _movers(taus, epsilon)
    total = torch.zeros_like(taus[0])
    for t, m in zip(taus, moved, strict=True):
        if r:
            alone = m & (count == 1)
            unique, shared = int(alone.sum()), int((m & (count > 1)).sum())
            factor = 1 + r * min(max(shared / max(unique, epsilon or 1.0), 0.0), alpha)
            t = torch.where(alone, t * factor, t)
        total += torch.where(m, t, torch.zeros_like(t))
    return total / count.clamp(min=1)

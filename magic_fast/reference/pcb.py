"""PCB: parameter competition balancing (Du et al., arXiv 2410.02396; docs/methods.md).

Both competitions are ranked within one tensor, or within the whole model. Four numbers per expert
say all of it: bounds of the magnitudes, which any trim by magnitude finds, and of the scores. Those
of a model are found by counting digits, nothing but the counts is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from magic_fast.recipe import Trim
from magic_fast.reference.trim import RadixSelect, magnitude_bits

Vectors = Callable[[], Iterable[Sequence[Tensor]]]

_LEAST_SHARE = 1e-12


@dataclass(frozen=True)
class Bounds:
    """What ranks decide, K numbers each: magnitudes are held within [``low``, ``high``],
    competition scores within [``cut``, ``top``]."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    cut: tuple[float, ...] = ()
    top: tuple[float, ...] = ()


def scores(taus: Sequence[Tensor], k: int, bounds: Bounds) -> Tensor:
    """P_k = exp(K·minmax(α_k)²)·tanh(τ_k·Σ_j τ_j), α_k = |τ_k| within the bounds; the minmax of a
    constant is 0. Over e^K, which the minmax of the scores cancels, and float32 does not hold for
    K > 88."""
    alpha = taus[k].abs().clamp(bounds.low[k], bounds.high[k])
    span = bounds.high[k] - bounds.low[k]
    relative = (alpha - bounds.low[k]) / span if span > 0 else torch.zeros_like(alpha)
    total = torch.zeros_like(alpha)
    for t in taus:
        total += t
    return torch.exp(len(taus) * (relative.square() - 1)) * torch.tanh(taus[k] * total)


def tensor_scores(taus: Sequence[Tensor], trim: Trim, bounds: Bounds) -> Bounds:
    """``bounds`` with those of the scores of one tensor by itself. ``taus``: K, not empty."""
    n = taus[0].numel()
    found = [scores(taus, k, bounds).flatten() for k in range(len(taus))]
    cuts = tuple(
        float(torch.kthvalue(p, trim.score_index(k, n) + 1).values) for k, p in enumerate(found)
    )
    return replace(bounds, cut=cuts, top=tuple(float(p.max()) for p in found))


def score_bounds(
    vectors: Vectors, trim: Trim, bounds: Bounds, total: int, dtype: torch.dtype
) -> Bounds:
    """The same over a whole model: three reads of it (five in float64).

    Args:
        vectors: called once a read; yields the task vectors of every tensor, in ``dtype``.
        trim: its densities are the shares of the scores that count.
        total: elements of all tensors.
    """
    num_experts, n = len(bounds.low), total
    if n == 0:
        zeros = (0.0,) * num_experts
        return Bounds(zeros, zeros, zeros, zeros)

    def competing() -> Iterable[tuple[int, Tensor]]:
        for taus in vectors():
            for k in range(num_experts):
                yield k, scores(taus, k, bounds)

    above = [0] * num_experts  # scores ≥ 0
    top = [-math.inf] * num_experts
    for k, p in competing():
        if p.numel():
            above[k] += int((p >= 0).sum())
            top[k] = max(top[k], float(p.max()))
    ranks = [n - trim.score_index(k, n) for k in range(num_experts)]  # from the largest
    sides = [1.0 if ranks[k] <= above[k] else -1.0 for k in range(num_experts)]
    wanted = [
        (k, rank if sides[k] > 0 else n - rank + 1)  # from the largest magnitude of that sign
        for k, rank in enumerate(ranks)
    ]

    def of_one_sign() -> Iterable[tuple[int, Tensor]]:
        for k, p in competing():
            yield k, p[p >= 0] if sides[k] > 0 else p[p < 0]

    cuts = _select(wanted, of_one_sign, dtype)
    cut = tuple(side * value for side, value in zip(sides, cuts, strict=True))
    return replace(bounds, cut=cut, top=tuple(top))


def _select(
    wanted: Sequence[tuple[int, int]],
    values: Callable[[], Iterable[tuple[int, Tensor]]],
    dtype: torch.dtype,
) -> list[float]:
    """The rank-th largest |x| of each wanted (expert, rank from 1)."""
    bits = 64 if dtype == torch.float64 else 32
    searches = [(k, RadixSelect(rank, bits)) for k, rank in wanted]
    while not searches[0][1].done:
        for k, x in values():
            pattern = magnitude_bits(x.flatten())
            for expert, search in searches:
                if expert == k:
                    search.add(pattern)
        for _, search in searches:
            search.next_digit()
    word = torch.int64 if bits == 64 else torch.int32
    return [float(torch.tensor(s.prefix, dtype=word).view(dtype)) for _, s in searches]


def pcb(taus: Sequence[Tensor], bounds: Bounds) -> Tensor:
    """Δ = Σ s_k·τ̃_k / max(Σ s_k, 1e-12) with τ̃_k = sign(τ_k)·α_k and s_k = minmax of the scores
    above the cut.

    Args:
        taus: K task vectors, float32 or float64.
        bounds: all of them.
    """
    total, shares = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    for k, t in enumerate(taus):
        cut, top = bounds.cut[k], bounds.top[k]
        if top <= cut:
            continue
        share = (scores(taus, k, bounds).clamp(cut, top) - cut) / (top - cut)
        total += share * torch.sign(t) * t.abs().clamp(bounds.low[k], bounds.high[k])
        shares += share
    return total / shares.clamp(min=_LEAST_SHARE)

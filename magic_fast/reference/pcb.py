"""PCB: parameter competition balancing (Du et al., arXiv 2410.02396; docs/methods.md).

Both competitions are ranked within one tensor, or within the whole model. The latter needs four
numbers per expert before any tensor can be merged; :func:`model_bounds` finds them by counting
digits, nothing but the counts is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.reference.merge import decision_dtype, task_vectors
from magic_fast.reference.scope import RadixSelect
from magic_fast.reference.trim import kth_magnitude, magnitude_bits

Source = Callable[[], Iterable[tuple[Tensor | None, Sequence[Tensor]]]]

_TAIL = 1e-4  # share of the magnitudes beyond each bound
_LEAST_SHARE = 1e-12


@dataclass(frozen=True)
class Bounds:
    """What ranks decide, K numbers each: magnitudes are held within [``low``, ``high``],
    competition scores within [``cut``, ``top``]."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    cut: tuple[float, ...] = ()
    top: tuple[float, ...] = ()


def _tails(n: int) -> tuple[int, int]:
    """Ascending indices of the two magnitudes that bound an expert."""
    return math.trunc(_TAIL * n), max(math.trunc((1 - _TAIL) * n - 1), 0)


def _cut_index(n: int, ratio: float) -> int:
    return min(math.trunc((1 - ratio) * n), n - 1)


def scores(taus: Sequence[Tensor], k: int, bounds: Bounds) -> Tensor:
    """P_k = exp(K·minmax(α_k)²)·tanh(τ_k·Σ_j τ_j), α_k = |τ_k| within the bounds; the minmax of a
    constant is 0."""
    alpha = taus[k].abs().clamp(bounds.low[k], bounds.high[k])
    span = bounds.high[k] - bounds.low[k]
    relative = (alpha - bounds.low[k]) / span if span > 0 else torch.zeros_like(alpha)
    total = torch.zeros_like(alpha)
    for t in taus:
        total += t
    return torch.exp(len(taus) * relative.square()) * torch.tanh(taus[k] * total)


def tensor_bounds(taus: Sequence[Tensor], ratio: float) -> Bounds:
    """Bounds of one tensor by itself. ``taus``: K task vectors, not empty."""
    n = taus[0].numel()
    low, high = _tails(n)
    lows = tuple(kth_magnitude(t, n - low) for t in taus)
    highs = tuple(kth_magnitude(t, n - high) for t in taus)
    bounds = Bounds(lows, highs)
    found = [scores(taus, k, bounds).flatten() for k in range(len(taus))]
    index = _cut_index(n, ratio) + 1
    cuts = tuple(float(torch.kthvalue(p, index).values) for p in found)
    return Bounds(lows, highs, cuts, tuple(float(p.max()) for p in found))


def model_bounds(source: Source, ratio: float) -> Bounds:
    """Bounds over a whole model: five reads of it (nine in float64).

    Args:
        source: called once a read; yields (base or None, experts) of every tensor, in one order.
        ratio: share of the scores that count.
    """
    n, num_experts, dtype = 0, 0, torch.float32
    for base, experts in source():
        n, num_experts = n + experts[0].numel(), len(experts)
        if decision_dtype(base, experts) == torch.float64:
            dtype = torch.float64

    def vectors() -> Iterable[list[Tensor]]:
        for base, experts in source():
            yield task_vectors(base, experts, dtype)

    if n == 0:
        return Bounds(*((0.0,) * num_experts for _ in range(4)))
    low, high = _tails(n)
    ranks = [(k, n - index) for k in range(num_experts) for index in (low, high)]
    values = _select(ranks, lambda: ((k, t) for ts in vectors() for k, t in enumerate(ts)), dtype)
    bounds = Bounds(tuple(values[0::2]), tuple(values[1::2]))

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
    rank = n - _cut_index(n, ratio)  # from the largest
    sides = [1.0 if rank <= above[k] else -1.0 for k in range(num_experts)]
    wanted = [
        (k, rank if sides[k] > 0 else n - rank + 1)  # from the largest magnitude of that sign
        for k in range(num_experts)
    ]

    def of_one_sign() -> Iterable[tuple[int, Tensor]]:
        for k, p in competing():
            yield k, p[p >= 0] if sides[k] > 0 else p[p < 0]

    cuts = _select(wanted, of_one_sign, dtype)
    cut = tuple(side * value for side, value in zip(sides, cuts, strict=True))
    return Bounds(bounds.low, bounds.high, cut, tuple(top))


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
        bounds: of :func:`tensor_bounds` or :func:`model_bounds`.
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

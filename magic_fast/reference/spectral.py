"""Merging in the singular vectors of task vectors, in plain PyTorch: the formulas, with exact
decompositions unless others are handed in.

Notation: τ_k is a task vector of shape [m, n]; polar(X) = U Vᵀ of X = U Σ Vᵀ over the non-zero
singular values: the nearest partial isometry, zero for X = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def rank_cutoff(dtype: torch.dtype) -> float:
    """σ ≤ cutoff·σ_max counts as zero: above what rounding leaves of an exact zero in a product of
    low-rank factors, below the condition 1e6 that a polar factor must resolve."""
    return 2.0**-23 if dtype == torch.float32 else 1e-14


def thin_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, σ, Vᵀ), dtype of ``x``. Where LAPACK's divide and conquer does not converge (seen in
    float32 on near-orthonormal matrices): of the transpose, in float64."""
    try:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u, s, vh
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        v, s, uh = torch.linalg.svd(x.double().T, full_matrices=False)
        return uh.T.to(x.dtype), s.to(x.dtype), v.T.to(x.dtype)


class Factorizations(Protocol):
    """The product and the two decompositions that every formula here is written over."""

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b."""

    def polar(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """U Vᵀ over the non-zero singular values of ``x`` [m, n], in ``dtype`` (None: of ``x``),
        whose precision decides how it is computed and what counts as zero."""

    def leading(self, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(U [m, count], σ [count] descending, V [n, count]) of the largest singular values.
        Where σ is zero so are the columns of U and V: no direction is made up."""


@dataclass(frozen=True)
class ExactFactorizations:
    """By a thin singular value decomposition, in the dtype of the result.

    Attributes:
        cutoff: σ ≤ cutoff·σ_max counts as zero; None: by the dtype (:func:`rank_cutoff`).
    """

    cutoff: float | None = None

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def _used(self, s: Tensor) -> Tensor:
        return s > (rank_cutoff(s.dtype) if self.cutoff is None else self.cutoff) * s[0]

    def polar(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x = x if dtype is None else x.to(dtype)
        if x.numel() == 0:
            return torch.zeros_like(x)
        u, s, vh = thin_svd(x)
        factor: Tensor = (u * self._used(s)) @ vh
        return factor

    def leading(self, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        if x.numel() == 0 or count == 0:
            return (
                x.new_zeros(x.shape[0], count),
                x.new_zeros(count),
                x.new_zeros(x.shape[1], count),
            )
        u, s, vh = thin_svd(x)
        keep = self._used(s)[:count]
        return u[:, :count] * keep, s[:count] * keep, vh[:count].T * keep


EXACT = ExactFactorizations()


_CACHED = 2**18  # elements of a sum that stay in the cache of a CPU


def total(taus: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Σ τ_k in expert order, added up in ``dtype`` (None: theirs)."""
    result = torch.empty_like(taus[0], dtype=dtype or taus[0].dtype)
    # some rows at a time, which stay in the cache: 43 for 173 ms (4096², K = 8, into float64)
    large = result.numel() > _CACHED and result.device.type == "cpu"
    rows = max(1, _CACHED * result.shape[0] // result.numel()) if large else 0
    starts = range(0, result.shape[0], rows) if large else ()
    parts = [slice(start, start + rows) for start in starts]
    for part in parts or (...,):
        into = result[part]
        into.copy_(taus[0][part])
        for tau in taus[1:]:
            into += tau[part]
    return result


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether there is no NaN and no infinity: a decomposition takes none."""
    return all(bool(torch.isfinite(x).all()) for x in tensors)


def mean(taus: Sequence[Tensor]) -> Tensor:
    """What a tensor gets that a spectral method does not apply to."""
    return total(taus) / len(taus)


def iso_c(taus: Sequence[Tensor], by: Factorizations = EXACT) -> Tensor:
    """σ̄·polar(M), M = Σ τ_k and σ̄ its mean singular value = ⟨polar(M), M⟩ / min(m, n): every
    direction of the sum as strong as the average one (Marczak et al., arXiv 2502.04959).

    M is summed in float64: at condition 1e6 the roundings of a float32 sum alone turn the result
    by 1.6e-3, and one rounding of M by 9e-4.

    >>> iso_c([torch.diag(torch.tensor([3.0, 1.0]))])
    tensor([[2., 0.],
            [0., 2.]])
    """
    m = total(taus, torch.float64)
    factor = by.polar(m, taus[0].dtype)
    sigma = (factor * m).sum() / min(m.shape)
    return factor * sigma.to(factor.dtype)


def iso_cts_ranks(shape: Sequence[int], num_experts: int, fraction: float) -> tuple[int, int]:
    """(common rank c, rank t of each expert's own space): n = min(shape), the n − ⌊n·fraction⌋
    directions left are rounded (half to even) to a multiple of K.

    >>> iso_cts_ranks((768, 768), 8, 0.8)
    (616, 19)
    """
    n = min(shape)
    own = min(n, round((n - int(n * fraction)) / num_experts) * num_experts)
    own -= own % num_experts
    return n - own, own // num_experts


def iso_cts(taus: Sequence[Tensor], fraction: float, by: Factorizations = EXACT) -> Tensor:
    """s̄·polar(U)·polar(V)ᵀ, where U, V hold the top t triples of each τ_k outside the common space,
    then the top c of M = Σ τ_k, and s̄ is the mean of all their singular values
    (arXiv 2502.04959).

    Args:
        fraction: share of the directions that the common space takes, in [0, 1].
    """
    c, t = iso_cts_ranks(taus[0].shape, len(taus), fraction)
    common = by.leading(total(taus), c)
    parts = []
    if t > 0:
        u = common[0]
        outside = (tau - by.multiply(u, by.multiply(u.T, tau)) for tau in taus)
        parts = [by.leading(x, t) for x in outside]
    return _recombine([*parts, common], by, isotropic=True)


def tsv_m(taus: Sequence[Tensor], by: Factorizations = EXACT) -> Tensor:
    """polar(U)·diag(s)·polar(V)ᵀ, where U, s, V hold the top ⌊min(m, n)·(1/K)⌋ triples of each τ_k
    (Task Singular Vectors, Gargiulo et al., arXiv 2412.00081). Zero where that rank is 0."""
    count = int(min(taus[0].shape) * (1 / len(taus)))
    if count == 0:
        return torch.zeros_like(taus[0])
    return _recombine([by.leading(tau, count) for tau in taus], by, isotropic=False)


def _recombine(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], by: Factorizations, *, isotropic: bool
) -> Tensor:
    """polar(U)·diag(s)·polar(V)ᵀ of concatenated triples; ``isotropic``: s is their mean.

    Triples of σ = 0 count in the mean and nowhere else: their columns are zero.
    """
    u, s, v = (torch.cat([part[i] for part in parts], -1) for i in range(3))
    used = s > 0
    if isotropic:
        s = s.double().mean().to(s.dtype).expand_as(s)
    left, right = by.polar(u[:, used]), by.polar(v[:, used])
    return by.multiply(left * s[used], right.T)


def star(tau: Tensor, eta: float) -> Tensor:
    """The fewest singular triples that hold ``eta`` of Σσ, their σ scaled up to the whole sum
    (STAR, Lee et al., arXiv 2502.10339); a tensor that is not 2-D as it is.

    >>> star(torch.diag(torch.tensor([3.0, 1.0])), 0.5)
    tensor([[4., 0.],
            [0., 0.]])
    """
    if tau.dim() != 2 or tau.numel() == 0:
        return tau
    u, s, vh = thin_svd(tau)
    sums = s.double().cumsum(0)
    if float(sums[-1]) == 0:
        return tau
    rank = min(int((sums < eta * sums[-1]).sum()) + 1, len(s))
    factor = (sums[-1] / sums[rank - 1]).to(s.dtype)
    reduced: Tensor = (u[:, :rank] * (s[:rank] * factor)) @ vh[:rank]
    return reduced


def svc(taus: Sequence[Tensor], delta: Tensor, alpha: float) -> Tensor:
    """Δ with each singular value divided by how far the experts over-agree along it:
    σ_r ← σ_r·K / Σ_k max(alpha, s_kr), s_kr = σ_r⟨v_r, a_kr⟩ / max(‖a_kr‖², 1e-12), a_kr = τ_kᵀu_r.

    Args:
        taus: K task vectors [m, n].
        delta: the merged task vector [m, n].
        alpha: least s_kr that counts, > 0.

    Returns:
        float64 [m, n]; NaN where an input is not finite, which reaches every direction.
    """
    if delta.numel() == 0:
        return delta.double()
    if not all_finite([*taus, delta]):
        return torch.full_like(delta, math.nan, dtype=torch.float64)
    u, s, vh = thin_svd(delta.double())
    floor = torch.zeros_like(s)
    for tau in taus:
        a = u.T @ tau.double()  # [r, n]
        share = s * (vh * a).sum(-1) / a.square().sum(-1).clamp_min(1e-12)
        floor += torch.nan_to_num(share, nan=alpha).clamp_min(alpha)
    calibrated: Tensor = (u * (s * len(taus) / floor)) @ vh
    return calibrated


def lines_factor(alpha: float, beta: float, block: int | None, num_blocks: int) -> float:
    """alpha + beta·l/(L − 1) of block l; alpha outside blocks or where L = 1 (LiNeS, Wang et al.,
    arXiv 2410.17146)."""
    if block is None or num_blocks <= 1:
        return alpha
    return alpha + beta * block / (num_blocks - 1)


def lines_alpha(tensors: Iterable[tuple[Sequence[Tensor], Tensor]]) -> float:
    """(‖Σ τ‖₁ / ‖Δ‖₁) / K over all tensors of a model, which come as (K task vectors, Δ); 1 where
    Δ is zero."""
    sum_norm = merged_norm = 0.0
    num_experts = 1
    for taus, delta in tensors:
        num_experts = len(taus)
        sum_norm += float(total(taus).abs().sum(dtype=torch.float64))
        merged_norm += float(delta.abs().sum(dtype=torch.float64))
    return sum_norm / merged_norm / num_experts if merged_norm > 0 else 1.0


def block_of(name: str, num_blocks: int) -> int | None:
    """The first i of 0 … L−1 with ".i." in the tensor's name; None outside blocks."""
    return next((i for i in range(num_blocks) if f".{i}." in name), None)

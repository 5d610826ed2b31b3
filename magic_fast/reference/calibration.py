"""Weight-space calibration (WSC) in plain PyTorch: row statistics, the coefficient ξ, applying it
(docs/methods.md).

From one read of a row: Gram G_jk = ⟨τ_j, τ_k⟩, dots b_k = ⟨τ_k, d⟩ and s = ‖d‖². Everything else
is finished in float64 from these sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.recipe import Direction, EpsMode, Granularity, RowCalibration, Variant

_EPS = 1e-8
_WELL_CONDITIONED = 1e6
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


def _whole_tensor(stats: RowStats, p: float) -> RowStats:
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


def _projection(stats: RowStats, a: Tensor) -> Tensor:
    """‖d⊥‖² = max(0, s − 2Σ a_k b_k + Σ a_j a_k G_jk)."""
    cross = (a * stats.dots).sum(-1)
    inside = torch.einsum("rj,rjk,rk->r", a, stats.gram, a)
    return (stats.norm2 - 2 * cross + inside).clamp(min=0)


def _manifold(stats: RowStats, a: Tensor, norms: Tensor, mode: EpsMode) -> Tensor:
    mean = norms.mean(-1)
    absolute = _EPS if mode is EpsMode.ABSOLUTE else 0.0
    ellipsoid = (a * norms / (norms + absolute)).square() if absolute else a.square()
    if mode is EpsMode.NONE:
        ellipsoid = (a * norms / norms).square()
    sphere_eps = absolute + (_EPS * mean.square() if mode is EpsMode.RELATIVE else 0.0)
    circle = _projection(stats, a) / (mean.square() + sphere_eps)
    return (ellipsoid.sum(-1) + circle + _EPS).rsqrt()


def _sphere(stats: RowStats, p: float) -> Tensor:
    if p == 2:
        norms, merged = stats.gram.diagonal(dim1=-2, dim2=-1).sqrt(), stats.norm2.sqrt()
    else:
        assert stats.powers is not None and stats.merged_powers is not None
        norms, merged = stats.powers, stats.merged_powers
        if p != math.inf:
            norms, merged = norms.pow(1 / p), merged.pow(1 / p)
    return norms.mean(-1) / merged


def _exact(stats: RowStats, norms: Tensor, mode: EpsMode, p: float) -> Tensor:
    """``manifold`` with a = G⁺b where cond(G) ≤ 1e6 (float64), ``sphere`` elsewhere."""
    finite = torch.isfinite(stats.gram).all(-1).all(-1)
    gram = torch.where(finite[:, None, None], stats.gram, torch.zeros_like(stats.gram))
    values = torch.linalg.eigvalsh(gram)
    good = finite & (values[:, 0] > 0) & (values[:, -1] <= _WELL_CONDITIONED * values[:, 0])
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    safe = torch.where(good[:, None, None], gram, identity)
    a = torch.linalg.solve(safe, stats.dots.unsqueeze(-1)).squeeze(-1)
    return torch.where(good, _manifold(stats, a, norms, mode), _sphere(stats, p))


def coefficient(stats: RowStats, calibration: RowCalibration) -> Tensor:
    """The raw ξ, float64 [rows] ([1] under granularity ``tensor``). ``spectral`` needs the tensors
    themselves."""
    if calibration.included and not all(calibration.included):
        chosen = [k for k, yes in enumerate(calibration.included) if yes]
        stats = RowStats(
            stats.gram[:, chosen][:, :, chosen],
            stats.dots[:, chosen],
            stats.norm2,
            None if stats.powers is None else stats.powers[:, chosen],
            stats.merged_powers,
        )
    if calibration.granularity is Granularity.TENSOR:
        stats = _whole_tensor(stats, calibration.p)
    mode = calibration.eps_mode
    norms = stats.gram.diagonal(dim1=-2, dim2=-1).sqrt()
    if calibration.variant is Variant.MANIFOLD_EXACT:
        return _exact(stats, norms, mode, calibration.p)
    if calibration.variant is Variant.MANIFOLD:
        mean = norms.mean(-1, keepdim=True)
        eps = torch.zeros_like(mean)
        if mode is EpsMode.ABSOLUTE:
            eps += _EPS
        elif mode is EpsMode.RELATIVE:
            eps = _EPS * mean.square()
        return _manifold(stats, stats.dots / (norms.square() + eps), norms, mode)
    if calibration.variant is Variant.SPHERE:
        return _sphere(stats, calibration.p)
    return _sphere(stats, 2)  # spectral per row: the singular value of a row is its norm


def spectral_coefficient(taus: Sequence[Tensor], delta: Tensor) -> Tensor:
    """mean_k σ₁(τ_k) / σ₁(Δ) of [rows, cols] matrices, float64 [1]; NaN where one is not finite."""
    if not all(bool(torch.isfinite(t).all()) for t in (*taus, delta)):
        return torch.full((1,), math.nan, dtype=torch.float64, device=delta.device)
    top = [torch.linalg.matrix_norm(t, ord=2).double() for t in taus]
    ratio: Tensor = torch.stack(top).mean() / torch.linalg.matrix_norm(delta, ord=2).double()
    return ratio.reshape(1)


def act(
    raw: Tensor, calibration: RowCalibration, *, usable: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From the raw ξ to what multiplies each row of d.

    Order: raw → repair → side → strength → clamp → apply. A row where ξ does not act keeps d,
        factor 1.

    Args:
        raw: float64 [rows] or [1].
        usable: bool, rows whose n̄ and ‖d‖ are not zero; the guards set ξ = 1 elsewhere.

    Returns:
        (factor float64 [rows] or [1], repaired bool of the same shape).
    """
    one = torch.ones_like(raw)
    acts = torch.ones_like(raw, dtype=torch.bool)
    repaired = torch.zeros_like(acts)
    xi = raw
    if calibration.guards:
        repaired = ~torch.isfinite(raw)
        if usable is not None:
            repaired |= ~usable
        acts &= ~repaired
        xi = torch.where(repaired, one, xi)
    elif calibration.direction is not Direction.FREE:
        xi = torch.where(torch.isnan(raw), one, raw)
    if calibration.direction is Direction.GROW:
        acts &= xi > 1
    elif calibration.direction is Direction.SHRINK:
        acts &= xi < 1
    if calibration.strength != 1.0:
        xi = xi.pow(calibration.strength)
    if calibration.clamp is not None:
        xi = xi.clamp(*calibration.clamp)
    return torch.where(acts, calibration.scale * xi, one), repaired


@dataclass
class CalibratedRows:
    """ξ of a tensor. ``raw`` and ``factor``: float64 [rows]; ``repaired``: bool [rows]."""

    raw: Tensor
    factor: Tensor
    repaired: Tensor
    stats: RowStats


def calibrate_rows(
    taus: Sequence[Tensor], delta: Tensor, calibration: RowCalibration
) -> CalibratedRows:
    """Raw ξ and the factor of every row of ``delta``.

    Args:
        taus: K raw task vectors, whole tensors.
        delta: d, the merged task vector.
    """
    view = [row_view(t, calibration.axes) for t in taus]
    d = row_view(delta, calibration.axes)
    stats = row_stats(view, d, calibration.p if calibration.variant is not Variant.SPECTRAL else 2)
    if not needs_spectrum(calibration):
        return calibrate_stats(stats, calibration)
    chosen = [t for k, t in enumerate(view) if not calibration.included or calibration.included[k]]
    return calibrate_stats(stats, calibration, spectral_coefficient(chosen, d))


def needs_spectrum(calibration: RowCalibration) -> bool:
    """Whether ξ comes of singular values, which no sums of rows have."""
    per_tensor = calibration.granularity is Granularity.TENSOR
    return per_tensor and calibration.variant is Variant.SPECTRAL


def calibrate_stats(
    stats: RowStats, calibration: RowCalibration, raw: Tensor | None = None
) -> CalibratedRows:
    """Raw ξ and the factor of every row from sums of rows.

    Args:
        raw: ξ where it is known already (:func:`needs_spectrum`), float64 [1].
    """
    raw = coefficient(stats, calibration) if raw is None else raw
    norms2 = stats.gram.diagonal(dim1=-2, dim2=-1)
    if calibration.included:
        norms2 = norms2[:, torch.tensor(calibration.included, device=norms2.device)]
    lengths, length = norms2.sum(-1), stats.norm2
    if calibration.granularity is Granularity.TENSOR:
        lengths, length = lengths.sum().reshape(1), length.sum().reshape(1)
    usable = (lengths > 0) & (length > 0) & torch.isfinite(length)
    factor, repaired = act(raw, calibration, usable=usable)
    rows = stats.norm2.shape[0]
    return CalibratedRows(raw.expand(rows), factor.expand(rows), repaired.expand(rows), stats)


def norms2(rows: CalibratedRows) -> Tensor:
    """float64 [K + 2]: ‖τ_k‖² of each expert, ‖d‖² before and after the factors, over the whole
    tensor."""
    own = rows.stats.gram.diagonal(dim1=-2, dim2=-1).sum(0)
    before = rows.stats.norm2.sum()
    after = (rows.stats.norm2 * rows.factor.square()).sum()
    return torch.cat((own, torch.stack((before, after))))


def magnitude_of(norms2: Tensor) -> dict[str, float | None]:
    """‖Δ‖_F ÷ mean_k ‖τ_k‖_F before and after; None where all task vectors are zero."""
    mean = float(norms2[:-2].sqrt().mean())
    before, after = (float(x) for x in norms2[-2:].sqrt())
    known = mean > 0
    return {
        "magnitude_before": before / mean if known else None,
        "magnitude_after": after / mean if known else None,
    }


def apply_rows(delta: Tensor, factor: Tensor, axes: Sequence[int] = (0,)) -> Tensor:
    """factor[row]·delta, shape of ``delta``; ``factor`` float64 [rows] is used in delta's dtype."""
    front = [a % delta.dim() for a in axes]
    shape = [1] * delta.dim()
    back = [a for a in range(delta.dim()) if a not in front]
    extents = [delta.shape[a] for a in front] + [1] * len(back)
    order = [*front, *back]
    inverse = [order.index(a) for a in range(len(shape))]
    return delta * factor.to(delta.dtype).reshape(extents).permute(*inverse)

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

from magic_fast.recipe import (
    Direction,
    EpsMode,
    Granularity,
    RowCalibration,
    RowFunction,
    Variant,
)
from magic_fast.reference import functions
from magic_fast.reference.row_sums import RowStats as RowStats
from magic_fast.reference.row_sums import power_sums as power_sums
from magic_fast.reference.row_sums import row_stats as row_stats
from magic_fast.reference.row_sums import row_view as row_view
from magic_fast.reference.row_sums import whole_tensor

_EPS = 1e-8
_WELL_CONDITIONED = 1e6


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
    """The raw ξ, float64 [rows] ([1] under granularity ``tensor``). Not of what needs the tensors
    themselves (``RowCalibration.needs_tensors``)."""
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
        stats = whole_tensor(stats, calibration.p)
    if isinstance(calibration.variant, RowFunction):
        sums = stats.gram, stats.dots, stats.norm2
        return functions.coefficients(calibration.variant, sums, stats.norm2.shape[0])
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
    if not calibration.needs_tensors:
        return calibrate_stats(stats, calibration)
    variant = calibration.variant
    if not isinstance(variant, RowFunction):
        raw = spectral_coefficient(counting(view, calibration), d)
    elif variant.changes:
        raw = torch.ones_like(stats.norm2)
    else:
        count = 1 if calibration.granularity is Granularity.TENSOR else d.shape[0]
        chosen = torch.stack(counting(taus, calibration))
        raw = functions.coefficients(variant, (chosen, delta), count)
    return calibrate_stats(stats, calibration, raw)


def calibrated_change(
    taus: Sequence[Tensor], delta: Tensor, calibration: RowCalibration, factor: Tensor
) -> Tensor:
    """d after the calibration, in the dtype of ``delta``; ``factor`` is that of its rows."""
    variant = calibration.variant
    if isinstance(variant, RowFunction) and not by_factors(calibration):
        return functions.calibrated_change(variant, torch.stack(counting(taus, calibration)), delta)
    return delta if bool((factor == 1).all()) else apply_rows(delta, factor, calibration.axes)


def by_factors(calibration: RowCalibration) -> bool:
    """Whether it multiplies rows; else a function returns the calibrated change."""
    variant = calibration.variant
    return not (isinstance(variant, RowFunction) and variant.changes)


def counting(taus: Sequence[Tensor], calibration: RowCalibration) -> list[Tensor]:
    """Those of the experts that count."""
    return [t for k, t in enumerate(taus) if not calibration.included or calibration.included[k]]


def calibrate_stats(
    stats: RowStats, calibration: RowCalibration, raw: Tensor | None = None
) -> CalibratedRows:
    """Raw ξ and the factor of every row from sums of rows.

    Args:
        raw: ξ where it is known already (``RowCalibration.needs_tensors``), float64 [1] or [rows].
    """
    raw = coefficient(stats, calibration) if raw is None else raw
    norms2 = stats.gram.diagonal(dim1=-2, dim2=-1)
    if calibration.included:
        norms2 = norms2[:, torch.tensor(calibration.included, device=norms2.device)]
    lengths, length = norms2.sum(-1), stats.norm2
    if calibration.granularity is Granularity.TENSOR:
        lengths, length = lengths.sum().reshape(1), length.sum().reshape(1)
    usable = (lengths > 0) & (length > 0) & torch.isfinite(length)
    if isinstance(calibration.variant, RowFunction):
        functions.refuse_nan(calibration.variant, raw, usable & torch.isfinite(lengths))
    factor, repaired = act(raw, calibration, usable=usable)
    rows = stats.norm2.shape[0]
    return CalibratedRows(raw.expand(rows), factor.expand(rows), repaired.expand(rows), stats)


def norms2(rows: CalibratedRows, calibrated: Tensor | None = None) -> Tensor:
    """float64 [K + 2]: ‖τ_k‖² of each expert, ‖d‖² before and after the factors, over the whole
    tensor. ``calibrated``: d afterwards, where no factors make it."""
    own = rows.stats.gram.diagonal(dim1=-2, dim2=-1).sum(0)
    before = rows.stats.norm2.sum()
    if calibrated is None:
        after = (rows.stats.norm2 * rows.factor.square()).sum()
    else:
        after = calibrated.double().square().sum()
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

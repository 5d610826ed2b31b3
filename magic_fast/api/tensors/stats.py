"""Measurements: norms, cosines, sign conflicts, magnitude deviations, and the primitives for other
libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from magic_fast import ops
from magic_fast.api.tensors.models import Named, labelled, models_of, state_dict_of
from magic_fast.calibration import WeightCalibration
from magic_fast.engine import quantiles_of
from magic_fast.errors import InputError
from magic_fast.models import Role
from magic_fast.models.memory import roles_in_memory
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe, RowCalibration, Selection
from magic_fast.reference import calibration
from magic_fast.reference import merge as reference


@dataclass
class TensorStatistics:
    """What the task vectors of one tensor look like.

    Attributes:
        name, shape: which tensor.
        norms: ‖τ_k‖_F of each expert.
        cosines: K × K cosines between task vectors (0 where one is zero).
        sign_conflict: share of elements where two experts pull to opposite sides.
        merged_norm: ‖Δ‖_F of the merged model, or None.
        magnitude: ‖Δ‖_F ÷ mean_k ‖τ_k‖_F, 1 where the merge kept the experts' magnitude; None
            without a merged model or where all experts are zero.
        row_deviation: mean over rows of | ‖Δ_r‖ ÷ mean_k ‖τ_{k,r}‖ − 1 |, or None.
        magnitude_before: ``magnitude`` before calibration, or None where that is not known.
        coefficients: 5, 25, 50, 75 and 95 % points over the rows of the raw ξ: of those that were
            applied where ``calibrated``; else of what WSC (``manifold``) would apply to the merged
            tensor, or to what it was before. None without a merged model, and for tensors that WSC
            leaves alone.
        calibrated: whether the record of the merged model has this tensor's calibration.
    """

    name: str
    shape: tuple[int, ...]
    norms: tuple[float, ...]
    cosines: list[list[float]]
    sign_conflict: float
    merged_norm: float | None = None
    magnitude: float | None = None
    row_deviation: float | None = None
    magnitude_before: float | None = None
    coefficients: tuple[float, ...] | None = None
    calibrated: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def statistics_of(
    base: Tensor | None,
    experts: Sequence[Tensor],
    merged: Tensor | None,
    name: str = "",
    *,
    before: Tensor | None = None,
    role: Role | None = None,
) -> TensorStatistics:
    """Statistics of one tensor, sums in float64; ``role`` tells which axis its rows are."""
    taus = reference.task_vectors(base, experts, reference.decision_dtype(base, experts))
    shape = tuple(experts[0].shape)
    rows = WeightCalibration().resolve(name, shape, (1.0,) * len(taus), role=role)
    sums = _sums(base, experts, experts[0] if merged is None else merged, rows)
    total = sums.gram.sum(0)
    norms = total.diagonal().sqrt()
    scale = norms[:, None] * norms[None, :]
    cosines = torch.where(scale > 0, total / scale, torch.zeros_like(total))
    found = TensorStatistics(
        name, shape, tuple(norms.tolist()), cosines.tolist(), _sign_conflict(taus)
    )
    if merged is None:
        return found
    mean = float(norms.mean())
    found.merged_norm = float(sums.norm2.sum().sqrt())
    if mean > 0:
        found.magnitude = found.merged_norm / mean
        row_mean = sums.gram.diagonal(dim1=-2, dim2=-1).sqrt().mean(-1)
        live = row_mean > 0
        found.row_deviation = float((sums.norm2[live].sqrt() / row_mean[live] - 1).abs().mean())
    if before is not None:
        sums = _sums(base, experts, before, rows)
        found.magnitude_before = float(sums.norm2.sum().sqrt()) / mean if mean > 0 else None
    if rows is not None:
        live = (sums.norm2 > 0) & (sums.gram.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)
        coefficients = calibration.coefficient(sums, rows)[live]  # else the guards leave the row
        found.coefficients = quantiles_of(coefficients[coefficients.isfinite()].tolist())
    return found


def _sums(
    base: Tensor | None, experts: Sequence[Tensor], other: Tensor, rows: RowCalibration | None
) -> calibration.RowStats:
    """Sums over the rows of the raw task vectors and of ``other − base``."""
    if other.numel() == 0 or not other.dim():  # one row
        taus = reference.task_vectors(
            base, [*experts, other], reference.decision_dtype(base, experts)
        )
        *own, delta = (t.reshape(1, -1) for t in taus)
        return calibration.row_stats(own, delta)
    recipe = Recipe(weights=(1.0,) * len(experts))
    job = Job(base, experts, recipe, calibration=rows)
    return calibration.RowStats(*ops.row_stats(job, other, backend="torch"))


def _sign_conflict(taus: Sequence[Tensor]) -> float:
    """Share of elements where two task vectors pull to opposite sides."""
    if not taus[0].numel():
        return 0.0
    positive = torch.zeros(taus[0].shape, dtype=torch.bool, device=taus[0].device)
    negative = torch.zeros_like(positive)
    for t in taus:
        positive |= t > 0
        negative |= t < 0
    return float((positive & negative).double().mean())


def task_vector_stats(base: Any, experts: Any, merged: Any = None) -> Any:
    """Norms, cosines, sign conflict and magnitude deviation of task vectors.

    Args:
        base: tensor, state dict or module; None where the others are task vectors already.
        experts: K of the same kind.
        merged: a merged model to compare with, or None.

    Returns:
        A :class:`TensorStatistics`, or a dict of them by name; integer tensors are left out.

    >>> s = task_vector_stats(torch.zeros(2), [torch.tensor([3.0, 4.0]), torch.tensor([3.0, -4.0])])
    >>> s.norms, s.sign_conflict
    ((5.0, 5.0), 0.5)
    """
    models = models_of(experts, "experts")
    rows = labelled(base, models)
    if merged is not None:
        rows.append(("merged", state_dict_of(merged, "merged")))
    table = Named(rows)
    found = {}
    roles = roles_in_memory(base, table.first)
    for name, start, own in table.floating(base is not None):
        end = own.pop() if merged is not None else None
        found[name] = statistics_of(start, own, end, name, role=roles.get(name))
    return found[""] if table.bare else found


def row_stats(
    base: Tensor | None,
    experts: Sequence[Tensor],
    merged: Tensor,
    *,
    row_axis: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows of raw task vectors and of d = merged − base, in float64.

    Args:
        base: θ_0 or None where the others are task vectors.
        experts: K tensors of one shape with at least one dimension.
        merged: the merged tensor.
        row_axis: axis of the rows.

    Returns:
        gram [rows, K, K] = ⟨τ_j, τ_k⟩, dots [rows, K] = ⟨τ_k, d⟩, norm2 [rows] = ‖d‖².

    >>> gram, dots, norm2 = row_stats(None, [torch.ones(1, 3)], torch.full((1, 3), 2.0))
    >>> gram.item(), dots.item(), norm2.item()
    (3.0, 6.0, 12.0)
    """
    if merged.dim() == 0:
        raise InputError("merged: expected a tensor with rows, got a 0-d tensor.")
    rows = merged.shape[row_axis]
    cols = merged.numel() // rows if rows else 0
    view = RowCalibration(rows, cols, axes=(row_axis % merged.dim(),))
    job = Job(base, experts, Recipe(weights=(1.0,) * len(experts)), calibration=view)
    return ops.row_stats(job, merged, backend=backend)


def select(
    base: Tensor | None,
    experts: Sequence[Tensor],
    recipe: Recipe,
    *,
    name: str = "",
    backend: str | None = None,
) -> Selection:
    """Thresholds, tie cuts, norm factors and majority sign that a merge of this recipe uses."""
    return ops.select(Job(base, experts, recipe, name=name), backend=backend)


def kth_magnitude(x: Tensor, k: int) -> float:
    """The k-th largest |x|, exactly, without sorting.

    Args:
        x: floating tensor of any shape; computed in float32 (float64 for float64).
        k: from 1 to the number of elements.

    >>> kth_magnitude(torch.tensor([1.0, -3.0, 2.0]), 2)
    2.0
    """
    if not 1 <= k <= x.numel():
        raise InputError(f"k: expected 1 to {x.numel()} (the number of elements), got {k}.")
    return ops.kth_magnitude(x, k)


def row_norms(x: Tensor, p: float = 2, *, row_axis: int = 0) -> Tensor:
    """p-norm of every row, float64 [rows].

    >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.], dtype=torch.float64)
    """
    rows = calibration.row_view(x, (row_axis,)).double()
    norms: Tensor = torch.linalg.vector_norm(rows, p, dim=-1)
    return norms

"""Changes of weights as products of two factors, and what WSC asks of their rows, without the
products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.recipe import RowCalibration, RowFunction, Variant
from magic_fast.reference.calibration import (
    CalibratedRows,
    RowStats,
    calibrate_stats,
    power_sums,
)
from magic_fast.spectral import low_rank_svd, stack_factors

_NOISE = 2.0**-22  # of the longest of the experts' rows: what rounding leaves where rows cancel
_BLOCK_ELEMENTS = 1 << 22  # of rows that are made where a norm other than 2 is asked for


@dataclass(frozen=True)
class LowRank:
    """B·A, an adapter's scaling in A, as its file has them.

    Attributes:
        up: B [rows, r].
        down: A [r, cols].
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return int(self.up.shape[1])

    @property
    def turned(self) -> LowRank:
        """The transpose, (B·A)ᵀ."""
        return LowRank(self.down.T, self.up.T)

    def dense(self) -> Tensor:
        """[rows, cols]."""
        return self.up @ self.down

    def largest(self, label: str) -> Tensor:
        """σ₁, float64 [1]."""
        if not self.rank:
            return torch.zeros(1, dtype=torch.float64)
        return low_rank_svd(self.up.double(), self.down.double(), 1, label=label)[1]


def no_change(like: LowRank) -> LowRank:
    """Zeros of the shape of another: factors of rank 0."""
    return LowRank(like.up[:, :0], like.down[:0])


def combined(changes: Sequence[LowRank], coefficients: Sequence[float]) -> LowRank:
    """Σ_k c_k·B_k·A_k, exactly: B side by side, c_k·A_k one above the other."""
    turned = [change.turned for change in changes]
    up, down = stack_factors([t.up for t in turned], [t.down for t in turned], coefficients)
    return LowRank(up, down).turned


def truncated(change: LowRank, rank: int, label: str) -> tuple[LowRank, float]:
    """The nearest of at most that rank, its norm shared evenly between the factors, and the share
    of the norm that is lost, ‖dropped‖ ÷ ‖all‖."""
    u, s, v = low_rank_svd(change.up, change.down, label=label)
    kept = min(rank, s.numel())
    return balanced(u[:, :kept], s[:kept], v[:, :kept]), lost(s[kept:], s)


def balanced(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    """U·diag(σ)·Vᵀ as U·√σ and √σ·Vᵀ."""
    return LowRank(u * s.sqrt(), (v * s.sqrt()).T)


def evened(change: LowRank) -> LowRank:
    """The same product, bit for bit, each column of B as long as its row of A up to a power of two:
    so float16 holds both, where all of a small scaling in A would fall below its range."""
    ups, downs = change.up.norm(dim=0), change.down.norm(dim=1)
    share = (downs / ups).log2().div(2).round()
    scale = torch.where(share.isfinite(), share, torch.zeros_like(share)).exp2()
    return LowRank(change.up * scale, change.down / scale[:, None])


def lost(dropped: Tensor, whole: Tensor) -> float:
    """‖dropped‖ ÷ ‖whole‖; 0 where all is zero."""
    total = whole.double().norm()
    return float(dropped.double().norm() / total) if total > 0 else 0.0


def row_stats(changes: Sequence[LowRank], merged: LowRank, p: float = 2) -> RowStats:
    """What WSC needs of the rows of K changes τ_k and of the merged one, from products of factors:

    ⟨τ_j,r, τ_k,r⟩ = B_j[r,:]·(A_j·A_kᵀ)·B_k[r,:]ᵀ

    in O(rows·r²) for a pair, none of them formed; float64. Where ``p`` is not 2 rows are made, in
    blocks.
    """
    every = [*changes, merged]
    ups = [change.up.double() for change in every]
    downs = [change.down.double() for change in every]
    k, rows = len(every), ups[0].shape[0]
    gram = ups[0].new_empty(rows, k, k)
    for j in range(k):
        for i in range(j + 1):
            inner = ups[j] @ (downs[j] @ downs[i].T)
            gram[:, j, i] = gram[:, i, j] = (inner * ups[i]).sum(-1)
    stats = RowStats(gram[:, :-1, :-1], gram[:, :-1, -1], gram[:, -1, -1])
    if p == 2:
        return stats
    powers = ups[0].new_empty(rows, k)
    step = max(1, _BLOCK_ELEMENTS // max(1, downs[0].shape[1] * k))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        made = torch.stack([up[block] @ down for up, down in zip(ups, downs, strict=True)], dim=1)
        powers[block] = power_sums(made, p)
    stats.powers, stats.merged_powers = powers[:, :-1], powers[:, -1]
    return stats


def calibrated(
    changes: Sequence[LowRank], merged: LowRank, calibration: RowCalibration, label: str
) -> tuple[LowRank, CalibratedRows]:
    """The merged change with its rows calibrated, at its own rank: the factor of a row is one of a
    row of B."""
    p = 2 if calibration.variant is Variant.SPECTRAL else calibration.p
    raw = None
    if isinstance(calibration.variant, RowFunction) and calibration.variant.whole:
        raise InputError(
            f"calibrate for '{label}': expected a variant that adapters have the sums of rows for, "
            f"got '{calibration.variant}', which looks at whole tensors. Choose another variant, "
            "or merge the full models."
        )
    if calibration.needs_tensors:
        chosen = [
            c for k, c in enumerate(changes) if not calibration.included or calibration.included[k]
        ]
        own = torch.stack([change.largest(label) for change in chosen])
        raw = own.mean(0) / merged.largest(label)
    stats = row_stats(changes, merged, p)
    longest = stats.gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    cancelled = stats.norm2 <= _NOISE**2 * longest  # no direction, as the guards have it
    stats.norm2 = stats.norm2.masked_fill(cancelled, 0)
    if stats.merged_powers is not None:
        stats.merged_powers = stats.merged_powers.masked_fill(cancelled, 0)
    rows = calibrate_stats(stats, calibration, raw)
    return replace(merged, up=merged.up * rows.factor[:, None].to(merged.up.dtype)), rows

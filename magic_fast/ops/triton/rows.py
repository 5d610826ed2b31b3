"""Calibrated merges with the Triton kernels: fused where a row fits a program, else sums, torch,
apply.

The long way reads base and experts twice. Its middle, from the sums to ξ, is the reference's own
float64 formulas run by torch on the device: a few numbers a row, eigenvalues among them
(``manifold_exact``), which no kernel of ours would do better.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.kernels import launch, merge, rows
from magic_fast.kernels import sums as kernels
from magic_fast.ops.gpu.jobs import Device, multiprocessors
from magic_fast.ops.gpu.rows import Rows, by_sums, stats_of
from magic_fast.recipe import Granularity, RowCalibration, Variant
from magic_fast.recipe.codes import DIRECTIONS, EPS_MODES, VARIANTS
from magic_fast.reference import calibration as wsc

_OPTIONS = {"enable_fp_fusion": False}
_SPLIT_BLOCKS = 8  # blocks that are summed in float32 before they go to float64


@dataclass
class Sources:
    """A job on the device, what is merged and where it goes. With ``merged`` given the rule is that
    of d = merged − base."""

    d: Device
    merged: Tensor
    out: Tensor
    report: Tensor
    keeps: bool  # rows of factor 1 keep the bits of `merged`


def calibrated(s: Sources) -> Rows:
    """Runs one job with its calibration."""
    c = s.d.job.calibration
    assert c is not None
    sphere = c.variant is Variant.SPECTRAL or (c.variant is Variant.SPHERE and c.p == 2)
    fits = launch.row_shape(len(s.d.experts), s.d.widest, c.cols, s.d.trims, s.d.scored)
    by_row = c.granularity is Granularity.ROW and (sphere or c.variant is Variant.MANIFOLD)
    if by_row and fits is not None:
        return _fused(s, c, sphere, fits)
    return _in_two_passes(s, c)


@functools.lru_cache(maxsize=64)
def _policy(device: torch.device, *numbers: float) -> Tensor:
    """float64 on the device, the same tensor for every layer of a model: a call copies nothing and
    can be captured in a graph once another has been made."""
    found = torch.tensor(numbers, dtype=torch.float64).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # whatever stream reads it next
    return found


def _fused(s: Sources, c: RowCalibration, sphere: bool, shape: launch.RowShape) -> Rows:
    d, k = s.d, len(s.d.experts)
    device = d.base.device
    clamp = c.clamp or (0.0, 0.0)
    found = Rows(
        torch.empty(c.rows, dtype=torch.float32, device=device),
        torch.empty(c.rows, dtype=torch.uint8, device=device),
        torch.empty((c.rows, k + 2), dtype=torch.float64, device=device),
        torch.zeros((c.rows, k), dtype=torch.int32, device=device),
    )
    chosen = tuple(i for i in range(k) if not c.included or c.included[i])
    pointers = (
        d.base, d.experts, s.merged, s.out, d.masks, d.task_masks, d.integers, d.floats,
        _policy(device, c.strength, c.scale, *clamp), found.coefficient, found.repaired,
        found.norms2, found.counts, s.report, c.cols,
    )  # fmt: skip
    words = (
        k, d.has_base, d.numbers.kinds, d.numbers.rule, chosen, VARIANTS[Variant(c.variant)],
        EPS_MODES[c.eps_mode], c.guards, c.clamp is not None, c.strength != 1,
        DIRECTIONS[c.direction], s.keeps, d.aligned(c.cols),
        k + 1 if sphere else (k + 1) * (k + 2) // 2, d.words,
    )  # fmt: skip
    end = (shape.lanes, shape.vec)
    options = {**_OPTIONS, "num_warps": shape.warps}
    if shape.kept:
        rows.merge_rows[(c.rows,)](*pointers, d.job.offset, *words, shape.chunks, *end, **options)
    else:
        programs = launch.row_programs(c.rows, multiprocessors(device))
        length = shape.chunks * shape.block
        scratch = torch.empty((programs, length), dtype=torch.float32, device=device)
        rows.merge_rows_scratch[(programs,)](
            *pointers, scratch, c.rows, shape.chunks, d.job.offset, *words,
            launch.stages(d.trims), *end, **options,
        )  # fmt: skip
    found.repaired = found.repaired.view(torch.bool)
    found.norms2 = found.norms2.sum(0)
    return found


def row_sums(
    s: Sources, n_rows: int, cols: int, *, p: float, wide: bool, norms_only: bool = False
) -> wsc.RowStats:
    """Sums of rows of any length for any K: splits of rows, added in float64 in a fixed order.

    norms_only: of the Gram matrix the diagonal is enough.
    """
    d, k = s.d, len(s.d.experts)
    device = d.base.device
    shape = launch.block_shape(k, d.widest, d.trims)
    chunks = _SPLIT_BLOCKS
    splits = max(1, -(-cols // (chunks * shape.block)))
    gram = k <= launch.FUSED_EXPERTS
    m = k + 1
    count = m * (m + 1) // 2 if gram else m
    partial = torch.empty((n_rows, splits, count), dtype=torch.float64, device=device)
    power = -1 if p == 2 else 0 if p == math.inf else int(p)
    powers = torch.empty((n_rows, splits, m), dtype=torch.float64, device=device)
    kernels.sum_rows[(n_rows * splits,)](
        d.base, d.experts, s.merged, d.masks, d.task_masks, d.integers, d.floats, partial, powers,
        cols, splits, min(chunks, -(-cols // shape.block)), d.job.offset,
        k, d.has_base, d.numbers.kinds, d.numbers.rule, gram, power, wide,
        d.aligned(cols), shape.lanes, shape.vec, num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip
    sums = partial.sum(1)
    if gram:
        stats = stats_of(sums, k)
    else:
        tiles = _gram_in_tiles(s, n_rows, cols, wide, norms_only)
        stats = wsc.RowStats(tiles, sums[:, :k].contiguous(), sums[:, k].clone())
    if power >= 0:
        added = powers.amax(1) if power == 0 else powers.sum(1)
        stats.powers, stats.merged_powers = added[:, :k], added[:, k]
    return stats


def _gram_in_tiles(s: Sources, n_rows: int, cols: int, wide: bool, norms_only: bool) -> Tensor:
    """gram float64 [rows, K, K], a few experts on each side at a time; norms_only: zeros outside
    the tiles of the diagonal."""
    d, k, side = s.d, len(s.d.experts), launch.GRAM_TILE
    shape = launch.block_shape(2 * side, d.widest)
    chunks = min(_SPLIT_BLOCKS, -(-cols // shape.block))
    splits = -(-cols // (chunks * shape.block))
    gram = torch.zeros((n_rows, k, k), dtype=torch.float64, device=d.base.device)
    for i in range(0, k, side):
        for j in range(i, min(k, i + 1) if norms_only else k, side):
            left, right = d.experts[i : i + side], d.experts[j : j + side]
            a, b = len(left), len(right)
            partial = torch.empty((n_rows, splits, a, b), dtype=torch.float64, device=d.base.device)
            kernels.sum_gram_tile[(n_rows * splits,)](
                d.base, left, right, partial, cols, splits, chunks,
                a, b, d.has_base, wide, shape.lanes, shape.vec, num_warps=shape.warps, **_OPTIONS,
            )  # fmt: skip
            tile = partial.sum(1)
            gram[:, i : i + a, j : j + b] = tile
            gram[:, j : j + b, i : i + a] = tile.transpose(1, 2)
    return gram


def _in_two_passes(s: Sources, c: RowCalibration) -> Rows:
    """One read for the sums, the coefficient by torch, one read to merge."""
    per_tensor = c.granularity is Granularity.TENSOR
    n_rows, cols = (1, s.d.n) if per_tensor else (c.rows, c.cols)
    exact = c.variant is Variant.MANIFOLD_EXACT
    p = 2.0 if c.variant in (Variant.SPECTRAL, Variant.MANIFOLD) else c.p
    norms_only = c.variant in (Variant.SPHERE, Variant.SPECTRAL)
    stats = row_sums(s, n_rows, cols, p=p, wide=exact, norms_only=norms_only)
    return by_sums(stats, c, lambda factors: merged_blocks(s, n_rows, cols, factors))


def merged_blocks(s: Sources, n_rows: int, cols: int, factors: Tensor | None) -> Tensor:
    """The merge itself, rows multiplied by ``factors`` float32 [rows]; returns ``counts``."""
    d, k = s.d, len(s.d.experts)

    def run(shape: launch.Shape) -> Tensor:
        blocks = -(-cols // shape.block)
        counts = torch.empty((n_rows * blocks, k), dtype=torch.int32, device=d.base.device)
        merge.merge_blocks[(n_rows * blocks,)](
            d.base, d.experts, s.merged, s.out, d.masks, d.task_masks, d.integers, d.floats,
            d.floats if factors is None else factors, counts, s.report, cols, blocks,
            d.job.offset, k, d.has_base, d.numbers.kinds, d.numbers.rule, factors is not None,
            s.keeps and factors is not None, d.aligned(cols if n_rows > 1 else None), d.words,
            shape.lanes, shape.vec, num_warps=shape.warps, **_OPTIONS,
        )  # fmt: skip
        return counts

    key = (k, d.widest, d.numbers.kinds, d.numbers.rule, factors is None)
    return run(launch.tuned(key, launch.block_shape(k, d.widest, d.trims), run))


def scaled(d: Device, merged: Tensor, out: Tensor, factors: Tensor) -> None:
    """out = base + factors[row]·(merged − base). ``d``: of ``merged`` as its one expert."""
    n_rows = factors.numel()
    cols = d.n // n_rows
    shape = launch.block_shape(1, d.widest)
    blocks = -(-cols // shape.block)
    merge.scale_blocks[(n_rows * blocks,)](
        d.base, merged, out, factors, cols, blocks, d.has_base, shape.lanes, shape.vec,
        num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip

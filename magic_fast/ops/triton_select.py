"""What has to be known about a whole tensor before it is merged, found on the device: thresholds
and tie cuts, masks of ranked trims, norm factors, the majority sign. Nothing here waits for the
device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from magic_fast.kernels import cut, launch, norms, ranked, select
from magic_fast.ops.gpu_factors import find_factors
from magic_fast.ops.gpu_jobs import (
    BYTES,
    RUN,
    SAMPLE,
    SORT_BYTES,
    Device,
    Target,
    multiprocessors,
    places_of,
)
from magic_fast.recipe import TrimRule

_RANKED_ELEMENTS = 1 << 22  # sorted at a time: bounds the sort's workspace to some 64 MiB
_OPTIONS = {"enable_fp_fusion": False}
_PLAIN = (0,) * 11  # a rule without factors and weights


def prepare(d: Device) -> None:
    """Runs what the recipe needs of the whole tensor; results go into the device's numbers."""
    job = d.job
    if d.n == 0:
        return
    if job.recipe.trim.rule is TrimRule.RANKED:
        _ranked_masks(d)
    if job.selection is not None:
        return
    if d.numbers.targets:
        find_thresholds(d, d.numbers.targets)
    if job.recipe.needs_factors:
        find_factors(d, _norm_sums)
    if job.recipe.needs_majority:
        _majority(d)


# ---- thresholds ----
def workspace_bytes(num_experts: int, targets: int, total: int, device: torch.device) -> int:
    """Bytes that a select of one tensor takes beside its inputs."""
    shape = launch.block_shape(num_experts, 2)
    segments = launch.segments_for(-(-total // shape.block), multiprocessors(device))[0]
    bins = 8 if total >= 1 << 31 else 4
    sample = SORT_BYTES * num_experts * min(SAMPLE, total)
    size: int = targets * ((bins << _log_bins(targets, total)) + 80 + segments * (8 + 8)) + sample
    return size


def _log_bins(targets: int, n: int) -> int:
    """Bins of a scan: few enough to be looked through at once for a small tensor."""
    if n < 1 << 20:
        return 12
    return 16 if targets <= 32 else 15


def find_thresholds(d: Device, targets: list[Target]) -> None:
    """Thresholds and cuts of ``targets`` into the device's integers: one read of base and experts,
    as a rule."""
    base, experts, n, k = d.base, d.experts, d.n, len(d.experts)
    device, count = base.device, len(targets)
    run = 1 if n <= SAMPLE else RUN
    runs = min(n, SAMPLE) // run
    size = runs * run
    sample = torch.empty((k, size), dtype=torch.int32, device=device)
    has_base = d.has_base
    per_program = 1024 // run
    grid = (-(-runs // per_program),)
    select.sample_magnitudes[grid](
        base, experts, sample, n, n // runs, runs, k, has_base, per_program, run, **_OPTIONS
    )
    ordered = torch.sort(sample, dim=1).values
    words = [*places_of(targets, size, n), *(t.count for t in targets), *(t.owner for t in targets)]
    host = torch.tensor(words, dtype=torch.int64).to(device, non_blocking=True)
    places, counts, owners_at = host[: 3 * count], host[3 * count : 4 * count], host[4 * count :]
    owners = tuple(t.owner for t in targets)
    log_bins = _log_bins(count, n)
    state = torch.zeros((count, 8), dtype=torch.int64, device=device)
    heavy = torch.empty((count, 2), dtype=torch.int32, device=device)
    select.open_brackets[(count,)](
        ordered, places, state, heavy, owners_at, size, n, count, log_bins, **_OPTIONS
    )
    shape = launch.block_shape(max(k, count), d.widest)
    segments, chunks = launch.segments_for(-(-n // shape.block), multiprocessors(device))
    bin_type = torch.int64 if n >= 1 << 31 else torch.int32
    bins = torch.zeros((count, 1 << log_bins), dtype=bin_type, device=device)
    above = torch.zeros((segments, count), dtype=torch.int64, device=device)
    equals = torch.zeros((segments, count, 2), dtype=torch.int32, device=device)
    options = {**_OPTIONS, "num_warps": shape.warps}
    for _ in range(1 if size == n else 1 + math.ceil(31 / log_bins)):
        select.scan[(segments,)](
            base, experts, state, heavy, bins, above, equals, n, chunks,
            count, owners, has_base, log_bins, shape.lanes, shape.vec, **options,
        )  # fmt: skip
        select.locate[(count,)](
            state, heavy, bins, above, equals, counts, segments, count, log_bins, 4096,
            **{**_OPTIONS, "num_warps": 8},
        )  # fmt: skip
    rules = tuple(t.ties for t in targets)
    cut.count_equals[(segments,)](
        base, experts, state, equals, n, chunks, count, owners, rules, has_base,
        shape.lanes, shape.vec, **options,
    )  # fmt: skip
    cut.find_cuts[(count,)](
        base, experts, state, equals, d.integers, n, segments, chunks * shape.block,
        k, count, owners, tuple(int(t.top) for t in targets), rules, has_base, 1024, **options,
    )  # fmt: skip


# ---- ranked trims ----
def _ranked_masks(d: Device) -> None:
    """Keep masks of the experts that coins by rank decide, one byte an element."""
    job, trim = d.job, d.job.recipe.trim
    shape = job.experts[0].shape
    cols = d.n if len(shape) < 2 else d.n // int(shape[0])
    rows, k = d.n // cols, len(d.experts)
    low = [trim.density[i] - trim.epsilon[i] for i in range(k)]
    words = [*low, *(2 * e for e in trim.epsilon), *trim.density]
    chances = torch.tensor(words, dtype=torch.float64).to(d.base.device, non_blocking=True)
    step = max(1, _RANKED_ELEMENTS // cols)
    masks = list(d.masks)
    for i, kind in enumerate(d.numbers.kinds):
        if kind != BYTES or (job.masks is not None and job.masks[i] is not None):
            continue
        masks[i] = torch.empty(d.n, dtype=torch.uint8, device=d.base.device)
        for first in range(0, rows, step):
            part = slice(first * cols, min(rows, first + step) * cols)
            _rank(d, i, part, cols, chances, masks[i])
    d.masks = tuple(masks)


def _rank(d: Device, i: int, part: slice, cols: int, chances: Tensor, mask: Tensor) -> None:
    n, k = part.stop - part.start, len(d.experts)
    base, expert = d.base.view(-1)[part], d.experts[i].view(-1)[part]
    bits = torch.empty(n, dtype=torch.int32, device=base.device)
    shape = launch.block_shape(1, d.widest)
    ranked.magnitudes[(-(-n // shape.block),)](
        base, expert, bits, n, d.has_base, shape.lanes, shape.vec, **_OPTIONS
    )
    order = torch.sort(bits.view(-1, cols), dim=1, stable=True).indices
    blocks = -(-cols // 1024)
    ranked.keep_ranked[(n // cols * blocks,)](
        order, mask[part], d.integers, chances, i, cols, blocks, d.job.offset + part.start,
        k, 1024, **_OPTIONS,
    )  # fmt: skip


# ---- norms and votes ----
def _norm_sums(d: Device, power: int) -> Tensor:
    """float64 [programs, K, 2]: sums before and after the trim."""
    k = len(d.experts)
    shape = launch.block_shape(k, d.widest, True)
    blocks = -(-d.n // shape.block)
    chunks = min(64, max(1, blocks // 64))
    programs = -(-blocks // chunks)
    partial = torch.zeros((programs, k, 2), dtype=torch.float64, device=d.base.device)
    norms.norm_sums[(programs,)](
        d.base, d.experts, d.masks, d.integers, d.floats, partial, d.n, chunks, d.job.offset,
        k, d.has_base, d.numbers.kinds, _PLAIN, power, d.aligned(), shape.lanes, shape.vec,
        num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip
    return partial


def _majority(d: Device) -> None:
    """Sign of the sum of the elected signs, into the device's integers."""
    k = len(d.experts)
    shape = launch.block_shape(k, d.widest, True)
    programs = -(-d.n // shape.block)
    partial = torch.empty(programs, dtype=torch.int32, device=d.base.device)
    norms.vote_sums[(programs,)](
        d.base, d.experts, d.masks, d.integers, d.floats, partial, d.n, d.job.offset,
        k, d.has_base, d.numbers.kinds, d.numbers.rule, d.aligned(), shape.lanes, shape.vec,
        num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip
    d.integers[6 * k + 1] = torch.sign(partial.sum(dtype=torch.int64))

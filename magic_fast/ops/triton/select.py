"""What has to be known about a whole tensor before it is merged, found on the device: thresholds
and tie cuts, masks of ranked trims, norm factors, what the experts hold together, the majority
sign. Nothing here waits for the device, but for one number where a trim goes by the variance."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from magic_fast.kernels import cut, launch, norms, ranked, select
from magic_fast.ops.gpu import across as gpu_across
from magic_fast.ops.gpu.factors import find_factors
from magic_fast.ops.gpu.jobs import (
    RUN,
    SAMPLE,
    SORT_BYTES,
    Device,
    multiprocessors,
    places_of,
)
from magic_fast.ops.gpu.numbers import BYTES, Target
from magic_fast.recipe import TrimRule, Weigh

_RANKED_ELEMENTS = 1 << 22  # sorted at a time: bounds the sort's workspace to some 64 MiB
_OPTIONS = {"enable_fp_fusion": False}
_PLAIN = (0,) * 14  # a rule without factors and weights


def prepare(d: Device) -> None:
    """Runs what the recipe needs of the whole tensor; results go into the device's numbers."""
    job = d.job
    if d.n == 0:
        return
    if job.recipe.trim.rule is TrimRule.RANKED:
        _ranked_masks(d)
    if job.selection is not None:
        return
    recipe = job.recipe
    if d.numbers.targets:
        find(d, d.numbers.targets, gpu_across.MAGNITUDE, d.integers)
    if recipe.needs_variance:
        gpu_across.find_varied(d, _varying(d), partial(find, d))
    if recipe.needs_factors:
        find_factors(d, _norm_sums)
    if recipe.weigh is Weigh.ENERGY:
        gpu_across.find_weights(d, _norm_sums)
    if recipe.weigh is Weigh.SCORE:
        gpu_across.find_scores(d, partial(find, d))
    if recipe.alone is not None:
        gpu_across.find_alone(d, _held(d))
    if recipe.needs_majority:
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


class _Scans:
    """Passes over a tensor that count keys for ``owners``, an expert each, and what they fill."""

    def __init__(self, d: Device, owners: tuple[int, ...], key: int) -> None:
        self.d, self.owners, self.key = d, owners, key
        k, n, count, device = len(d.experts), d.n, len(owners), d.base.device
        together = k if key == gpu_across.MAGNITUDE else 2 * k  # of which all are held at once
        self.shape = launch.block_shape(max(together, count), d.widest)
        blocks = -(-n // self.shape.block)
        self.segments, self.chunks = launch.segments_for(blocks, multiprocessors(device))
        self.log_bins = _log_bins(count, n)
        bin_type = torch.int64 if n >= 1 << 31 else torch.int32
        self.state = torch.zeros((count, 8), dtype=torch.int64, device=device)
        self.bins = torch.zeros((count, 1 << self.log_bins), dtype=bin_type, device=device)
        self.above = torch.zeros((self.segments, count), dtype=torch.int64, device=device)
        self.equals = torch.zeros((self.segments, count, 2), dtype=torch.int32, device=device)
        self.options = {**_OPTIONS, "num_warps": self.shape.warps}

    def run(self, heavy: Tensor) -> None:
        d = self.d
        select.scan[(self.segments,)](
            d.base, d.experts, d.integers, self.state, heavy, self.bins, self.above, self.equals,
            d.n, self.chunks, len(d.experts), len(self.owners), self.owners, d.has_base, self.key,
            self.log_bins, self.shape.lanes, self.shape.vec, **self.options,
        )  # fmt: skip


def find(d: Device, targets: list[Target], key: int, into: Tensor) -> None:
    """Thresholds and cuts of ``targets`` into rows of ``into``, as in the device's integers: one
    read of base and experts, as a rule. ``key``: what is compared (``gpu_across``)."""
    base, experts, n, k = d.base, d.experts, d.n, len(d.experts)
    device, count = base.device, len(targets)
    run = 1 if n <= SAMPLE else RUN
    runs = min(n, SAMPLE) // run
    size = runs * run
    sampled = 1 if key == gpu_across.VARIANCE else k
    sample = torch.empty((sampled, size), dtype=torch.int32, device=device)
    per_program = 1024 // run
    select.sample_keys[(-(-runs // per_program),)](
        base, experts, d.integers, sample, n, n // runs, runs, k, d.has_base, key, sampled,
        per_program, run, **_OPTIONS,
    )  # fmt: skip
    ordered = torch.sort(sample, dim=1).values
    words = [*places_of(targets, size, n), *(t.count for t in targets), *(t.owner for t in targets)]
    host = torch.tensor(words, dtype=torch.int64).to(device, non_blocking=True)
    places, counts, owners_at = host[: 3 * count], host[3 * count : 4 * count], host[4 * count :]
    owners, rules = tuple(t.owner for t in targets), tuple(t.ties for t in targets)
    scans = _Scans(d, owners, key)
    state, equals, segments = scans.state, scans.equals, scans.segments
    heavy = torch.empty((count, 2), dtype=torch.int32, device=device)
    select.open_brackets[(count,)](
        ordered, places, state, heavy, owners_at, size, n, count, scans.log_bins, **_OPTIONS
    )
    for _ in range(1 if size == n else 1 + math.ceil(31 / scans.log_bins)):
        scans.run(heavy)
        select.locate[(count,)](
            state, heavy, scans.bins, scans.above, equals, counts, segments, count,
            scans.log_bins, 4096, **{**_OPTIONS, "num_warps": 8},
        )  # fmt: skip
    shape = scans.shape
    cut.count_equals[(segments,)](
        base, experts, d.integers, state, equals, n, scans.chunks, k, count, owners, rules,
        d.has_base, key, shape.lanes, shape.vec, **scans.options,
    )  # fmt: skip
    cut.find_cuts[(count,)](
        base, experts, state, equals, into, n, segments, scans.chunks * shape.block,
        k, count, owners, tuple(int(t.top) for t in targets), rules, d.has_base, key, 1024,
        **scans.options,
    )  # fmt: skip


def _varying(d: Device) -> int:
    """Entries whose variance is not 0: those above a bracket of nothing but 0. Waits for the
    device."""
    scans = _Scans(d, (0,), gpu_across.VARIANCE)
    zeros = torch.tensor([[0, -2]], dtype=torch.int32).to(d.base.device, non_blocking=True)
    scans.run(zeros)
    return int(scans.above.sum())


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


def _held(d: Device) -> Tensor:
    """int64 [K, 2]: entries that each expert holds alone, and with others."""
    k = len(d.experts)
    shape = launch.block_shape(k, d.widest, True)
    programs = -(-d.n // shape.block)
    partial = torch.empty((programs, k, 2), dtype=torch.int32, device=d.base.device)
    norms.held_counts[(programs,)](
        d.base, d.experts, d.masks, d.integers, d.floats, partial, d.n, d.job.offset,
        k, d.has_base, d.numbers.kinds, d.numbers.rule, d.aligned(), shape.lanes, shape.vec,
        num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip
    return partial.sum(0, dtype=torch.int64)

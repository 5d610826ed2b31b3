"""What has to be known about a whole tensor before it is merged, found by the CUDA kernels:
thresholds and tie cuts, masks of trims by rank or variance, norm factors, what the experts hold
together, the majority sign. Nothing here waits for the device, but for one number where a trim goes
by the variance."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.cuda.calls import call_job, extension, stream_of_device
from magic_fast.ops.gpu import across as gpu_across
from magic_fast.ops.gpu.factors import find_factors
from magic_fast.ops.gpu.jobs import (
    SAMPLE,
    SORT_BYTES,
    Device,
    multiprocessors,
    sample_of,
    search_words,
)
from magic_fast.ops.gpu.numbers import BYTES, KEEP_ALL, VARIED, Target
from magic_fast.recipe import TrimRule, Weigh

_SUM_BLOCK = 1 << 16  # elements of a partial sum
_RANKED_ELEMENTS = 1 << 22  # sorted at a time: bounds the sort's workspace to some 64 MiB
_VECTOR = 8 * 128  # elements of one step of a block
_BIN_BYTES = 32 << 20  # of all targets of a select
_SEGMENTS = 8  # of a scan, a multiprocessor


def prepare(d: Device, report: Tensor, kept: Tensor) -> None:
    """Runs what the recipe needs of the whole tensor; results go into the device's numbers."""
    job = d.job
    if d.n == 0:
        return
    if job.recipe.trim.rule is TrimRule.RANKED:
        _ranked_masks(d, report, kept)
    if job.selection is None:
        _select(d, report, kept)
    elif VARIED in d.numbers.kinds:
        _mask_varied(d, report, kept)


def _select(d: Device, report: Tensor, kept: Tensor) -> None:
    recipe = d.job.recipe

    def find(targets: list[Target], key: int, into: Tensor) -> None:
        words = torch.tensor(search_words(targets, d.job), dtype=torch.int64)
        _find(d, targets, words.to(into.device, non_blocking=True), key, into, report, kept)

    def norm_sums(of: Device, power: int) -> Tensor:
        return _norm_sums(of, power, report, kept)

    if d.numbers.targets:
        key = gpu_across.MAGNITUDE
        _find(d, d.numbers.targets, d.search, key, d.integers, report, kept)
    if VARIED in d.numbers.kinds:
        gpu_across.find_varied(d, _varying(d, report, kept), find)
        _mask_varied(d, report, kept)
    if recipe.needs_factors:
        find_factors(d, norm_sums)
    if recipe.weigh is Weigh.ENERGY:
        gpu_across.find_weights(d, norm_sums)
    if recipe.weigh is Weigh.SCORE:
        gpu_across.find_scores(d, find)
    if recipe.alone is not None:
        gpu_across.find_alone(d, _held(d, report, kept))
    if recipe.needs_majority:
        _majority(d, report, kept)


def segments_of(n: int, processors: int) -> tuple[int, int]:
    """(segments, elements of each) of a scan: a few a multiprocessor, whole steps of a block."""
    steps = -(-n // _VECTOR)
    length = -(-steps // (_SEGMENTS * processors)) * _VECTOR
    return -(-n // length), length


def log_bins_of(targets: int, n: int) -> int:
    """Bins of a scan. One scan is enough where the bracket has no more bit patterns than bins, else
    the next one looks into one bin: so as many as 32 MiB hold for all targets, 4 bytes each, and as
    are worth clearing for a tensor of ``n`` elements."""
    if n < 1 << 20:
        return 12
    return min((_BIN_BYTES // (4 * targets)).bit_length() - 1, (n // 2).bit_length() - 1, 22)


def scans_for(sampled_all: bool, log_bins: int) -> int:
    """Launches of a scan: one where the sample is the tensor, else as many as a bracket that missed
    needs; those with nothing left to do return at once."""
    return 1 if sampled_all else 1 + math.ceil(31 / log_bins)


def workspace_bytes(num_experts: int, targets: int, total: int, device: torch.device) -> int:
    """Bytes that a select of one tensor takes beside its inputs."""
    segments = segments_of(total, multiprocessors(device))[0]
    bins = 1 << log_bins_of(targets, total)
    sample = SORT_BYTES * num_experts * min(SAMPLE, total)
    return targets * (4 * bins + 8 * (bins >> 10) + 24 * segments + 128) + sample


def _find(
    d: Device,
    targets: list[Target],
    words: Tensor,
    key: int,
    into: Tensor,
    report: Tensor,
    kept: Tensor,
) -> None:
    """Thresholds and cuts of ``targets`` into rows of ``into``, as in the device's integers.
    ``words``: see :func:`~magic_fast.ops.gpu.jobs.search_words`."""
    n, k, count = d.n, len(d.experts), len(targets)
    device = d.integers.device
    runs, run = sample_of(n)
    size = runs * run
    log_bins = log_bins_of(count, n)
    segments, length = segments_of(n, multiprocessors(device))
    scans = scans_for(size == n, log_bins)

    def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    sample = room(1 if key == gpu_across.VARIANCE else k, size, dtype=torch.int32)
    parts = {
        "state": room(count, 8),
        "heavy": room(count, 2, dtype=torch.int32),
        "bins": room(count, 1 << log_bins, dtype=torch.int32),
        "coarse": room(count, (1 << log_bins) >> 10),
        "above": room(segments, count),
        "equals": room(segments, count, 2),
    }
    native, stream = extension(), stream_of_device(device)
    search = native.Search(
        sample=sample.data_ptr(),
        **{name: x.data_ptr() for name, x in parts.items()},
        places=words.data_ptr(),
        counts=words[3 * count :].data_ptr(),
        numel=n, size=size, runs=runs, run=run, segments=segments, length=length,
        log_bins=log_bins, scans=scans, key=key,
    )  # fmt: skip
    job = call_job(d, report=report, kept=kept)
    native.sample(job, search, stream)
    ordered = torch.sort(sample, dim=1).values
    native.select(
        job,
        search,
        sorted=ordered.data_ptr(),
        owners=[t.owner for t in targets],
        tops=[t.top for t in targets],
        ties=[t.ties for t in targets],
        integers=into.data_ptr(),
        stream=stream,
    )


def _ranked_masks(d: Device, report: Tensor, kept: Tensor) -> None:
    """Keep masks of the experts that coins by rank decide, one byte an element. The sort of the
    rows is torch's: a radix sort of whole rows on the device is a solved problem."""
    job, trim = d.job, d.job.recipe.trim
    shape = job.experts[0].shape
    cols = d.n if len(shape) < 2 else d.n // int(shape[0])
    rows, k = d.n // cols, len(d.experts)
    step = max(1, _RANKED_ELEMENTS // cols)
    masks = list(d.masks)
    native, device = extension(), d.integers.device
    stream = stream_of_device(device)
    for i, kind in enumerate(d.numbers.kinds):
        if kind != BYTES or (job.masks is not None and job.masks[i] is not None):
            continue
        mask = masks[i] = torch.empty(d.n, dtype=torch.uint8, device=device)
        one = _only(d, i)
        for first in range(0, rows, step):
            part = min(rows, first + step) - first
            bits = torch.empty(part * cols, dtype=torch.int32, device=device)
            expert = call_job(one, report=report, kept=kept, start=first * cols)
            native.magnitudes(expert, part * cols, bits.data_ptr(), stream)
            order = torch.sort(bits.view(-1, cols), dim=1, stable=True).indices
            low = trim.density[i] - trim.epsilon[i]
            native.keep_ranked(
                order.data_ptr(), mask[first * cols :].data_ptr(), part, cols,
                job.offset + first * cols, d.numbers.integers[4 * k + i],
                d.numbers.integers[6 * k], low, 2 * trim.epsilon[i], trim.density[i], stream,
            )  # fmt: skip
    d.masks = tuple(masks)


def _only(d: Device, i: int) -> Any:
    """The job of expert ``i`` alone."""
    numbers = replace(d.numbers, kinds=(KEEP_ALL,))
    job = replace(d.job, experts=[d.experts[i]], masks=None, task_masks=None)
    return replace(d, job=job, numbers=numbers, masks=(d.masks[i],), task_masks=(d.masks[i],))


def _norm_sums(d: Device, power: int, report: Tensor, kept: Tensor) -> Tensor:
    """float64 [blocks, K, 2]: sums before and after the trim."""
    k = len(d.experts)
    blocks = -(-d.n // _SUM_BLOCK)
    partial = torch.zeros((blocks, k, 2), dtype=torch.float64, device=d.integers.device)
    job = call_job(d, report=report, kept=kept)
    stream = stream_of_device(d.integers.device)
    extension().norm_sums(job, d.n, power, partial.data_ptr(), stream)
    return partial


def _held(d: Device, report: Tensor, kept: Tensor) -> Tensor:
    """int64 [K, 2]: entries that each expert holds alone, and with others."""
    counts = torch.zeros((len(d.experts), 2), dtype=torch.int64, device=d.integers.device)
    job = call_job(d, report=report, kept=kept)
    extension().held(job, d.n, counts.data_ptr(), stream_of_device(d.integers.device))
    return counts


def _varied(d: Device, report: Tensor, kept: Tensor) -> Tensor:
    """uint8 [n]: entries whose variance lies at or above the bounds of ``d``."""
    mask = torch.empty(d.n, dtype=torch.uint8, device=d.integers.device)
    job = call_job(d, report=report, kept=kept)
    extension().keep_varied(job, d.n, mask.data_ptr(), stream_of_device(mask.device))
    return mask


def _varying(d: Device, report: Tensor, kept: Tensor) -> int:
    """Entries whose variance is not 0. Waits for the device."""
    above_zero = replace(d, integers=torch.zeros_like(d.integers))
    return int(_varied(above_zero, report, kept).count_nonzero())


def _mask_varied(d: Device, report: Tensor, kept: Tensor) -> None:
    """One mask for all experts that a trim by variance decides."""
    mask = _varied(d, report, kept)
    kinds = d.numbers.kinds
    d.masks = tuple(mask if k == VARIED else m for k, m in zip(kinds, d.masks, strict=True))


def _majority(d: Device, report: Tensor, kept: Tensor) -> None:
    """Sign of the sum of the elected signs, into the device's integers."""
    total = torch.zeros(1, dtype=torch.int64, device=d.integers.device)
    job = call_job(d, report=report, kept=kept)
    stream = stream_of_device(d.integers.device)
    extension().vote_sum(job, d.n, total.data_ptr(), stream)
    d.integers[6 * len(d.experts) + 1] = torch.sign(total[0])

"""Jobs on the device: their arrays, and the numbers of their recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.gpu.numbers import Numbers, Target, numbers_of
from magic_fast.ops.job import Job, View
from magic_fast.ops.limits import unfit_arrays
from magic_fast.recipe import Selection
from magic_fast.recipe.codes import Floats, Integers, place_of

SAMPLE = 32768  # magnitudes per expert at most, for the bracket of a threshold
RUN = 16  # of them side by side
SORT_BYTES = 48  # an element of the sample: magnitude, sorted, its place, and torch's sort itself


@dataclass
class Device:
    """One job on the device. ``search``: :func:`search_words` of its targets."""

    job: Job
    numbers: Numbers
    integers: Tensor
    floats: Tensor
    masks: tuple[Tensor, ...]
    task_masks: tuple[Tensor, ...]
    search: Tensor

    @property
    def experts(self) -> tuple[Tensor, ...]:
        return tuple(self.job.experts)

    @property
    def base(self) -> Tensor:
        """The base, or a tensor of the right device where there is none."""
        base: Tensor = self.job.experts[0] if self.job.base is None else self.job.base
        return base

    @property
    def has_base(self) -> bool:
        return self.job.base is not None

    @property
    def n(self) -> int:
        n: int = self.job.experts[0].numel()
        return n

    @property
    def widest(self) -> int:
        """Bytes of the widest input element."""
        given = [*self.job.experts, self.base]
        widest: int = max(t.element_size() for t in given)
        return widest

    @property
    def trims(self) -> bool:
        """Whether values are kept beside the task vectors: a trim, a vote or scores."""
        return any(self.numbers.kinds) or self.numbers.rule.vote != 0 or self.scored

    @property
    def scored(self) -> bool:
        """Whether scores weigh each entry (PCB)."""
        return self.numbers.rule.scored != 0

    @property
    def words(self) -> int:
        """Words that count kept entries, two experts each; 0 where nobody trims."""
        return (len(self.experts) + 1) // 2 if any(self.numbers.kinds) else 0

    def row(self, numbers: Tensor, row: int) -> Tensor:
        """One of the rows of K ``integers`` or ``floats`` (:mod:`magic_fast.recipe.codes`)."""
        return numbers[row * len(self.experts) :][: len(self.experts)]

    def aligned(self, cols: int | None = None) -> bool:
        """Whether blocks of rows of ``cols`` elements (None: of the whole) start at multiples
        of 4."""
        return self.job.offset % 4 == 0 and (cols is None or cols % 4 == 0)


def _bytes(masks: Sequence[Any] | None, like: Tensor, count: int) -> tuple[Tensor, ...]:
    """Masks as uint8; ``like`` where there is none (a kernel that takes it never reads it)."""
    if masks is None:
        return (like,) * count
    return tuple(like if m is None else m.view(torch.uint8) for m in masks)


def to_device(jobs: Sequence[Job]) -> list[Device]:
    """The jobs with their numbers on their device: two copies of a few bytes for all of them,
    which wait for nothing."""
    found = [numbers_of(job) for job in jobs]
    device = jobs[0].experts[0].device
    # a tensor of numbers is rounded to float32 here as `weights` are everywhere: once
    words = [x for f in found for x in f.integers]
    searches = [search_words(f.targets, j) for f, j in zip(found, jobs, strict=True)]
    integers = torch.tensor([*words, *(x for s in searches for x in s)], dtype=torch.int64)
    floats = torch.tensor([x for f in found for x in f.numbers], dtype=torch.float32)
    integers = integers.to(device, non_blocking=True)
    floats = floats.to(device, non_blocking=True)
    ready, i, f, at = [], 0, 0, len(words)
    for job, numbers, search in zip(jobs, found, searches, strict=True):
        k = len(job.experts)
        width, length = place_of(Integers.END, k), place_of(Floats.END, k)
        like = integers.view(torch.uint8)
        ready.append(
            Device(
                job,
                numbers,
                integers[i : i + width],
                floats[f : f + length],
                _bytes(job.masks, like, k),
                _bytes(job.task_masks, like, k),
                integers[at : at + len(search)],
            )
        )
        at += len(search)
        i, f = i + width, f + length
    return ready


def sample_of(n: int) -> tuple[int, int]:
    """(runs, elements of each) of the sample of a tensor of ``n`` elements."""
    run = 1 if n <= SAMPLE else RUN
    return min(n, SAMPLE) // run, run


def search_words(targets: list[Target], job: Job) -> list[int]:
    """What a search reads of its targets: three places of each bracket in the sorted sample, then
    ranks, then owners; an even number of words, so that those of every job of a call start at a
    multiple of 16 bytes, which Triton compiles for."""
    n: int = job.experts[0].numel()
    if not targets or n == 0:
        return []
    runs, run = sample_of(n)
    places = places_of(targets, runs * run, n)
    ranks, owners = [t.count for t in targets], [t.owner for t in targets]
    return [*places, *ranks, *owners, *[0] * (len(targets) % 2)]


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def places_of(targets: list[Target], sample: int, total: int) -> list[int]:
    """Positions in the ascending sample: bracket's low end, expected threshold, high end."""
    places = []
    for t in targets:
        q = t.count / total
        rank, margin = q * sample, 4.5 * math.sqrt(sample * q * (1 - q)) + 6
        if sample == total:  # the sample is all there is
            places += [total - t.count] * 3
            continue
        low = sample - int(rank + margin) if rank + margin <= sample else -1
        high = sample - int(rank - margin) if rank - margin >= 1 else sample
        places += [low, min(max(sample - int(rank), 0), sample - 1), high]
    return places


def everything(job: Job) -> Selection:
    return Selection.keep_everything(len(job.experts), job.experts[0].numel())


def unfit(job: Job) -> str | None:
    """The reason the kernels of a GPU cannot take the arrays of a job, or None."""
    if any(isinstance(a, View) for a in (job.base, job.out, *job.experts)):
        return "it takes torch tensors only"
    return unfit_arrays(job)

"""Jobs as the kernels of a GPU take them, Triton's and CUDA's: words, and numbers on the device."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.backend import Job, View
from magic_fast.recipe import (
    Align,
    Contributors,
    Recipe,
    Reduce,
    Rescale,
    Selection,
    TieRule,
    TrimRule,
    Vote,
    VoteOn,
    ZeroVote,
)

_INF_BITS = 0x7F800000
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

KEEP_ALL, ABOVE, BAND, RANDOM, BYTES = range(5)
_VOTES = {Vote.NONE: 0, Vote.MASS: 1, Vote.COUNT: 2}
_ZEROS = {ZeroVote.POSITIVE: 0, ZeroVote.NEGATIVE: 1, ZeroVote.MAJORITY: 2, ZeroVote.DROP: 3}
_WHO = {Contributors.AGREEING: 0, Contributors.NONZERO: 1, Contributors.ALL: 2}
_HOW = {Reduce.SUM: 0, Reduce.MEAN: 1, Reduce.WEIGHTED_MEAN: 2, Reduce.MAX: 3}
_TIES = {TieRule.EXACT: 0, TieRule.KEEP_ALL: 1, TieRule.DROP_ALL: 2}
SAMPLE = 32768  # magnitudes per expert at most, for the bracket of a threshold
RUN = 16  # of them side by side
SORT_BYTES = 48  # an element of the sample: magnitude, sorted, its place, and torch's sort itself
#: RULE of d = merged − base
MERGED_RULE = (0, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0)


def bits_of(value: float) -> int:
    """Bit pattern of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _signed(word: int) -> int:
    """A 64-bit word as int64 has it."""
    word &= _MASK_64
    return word - (1 << 64) if word >= 1 << 63 else word


@dataclass(frozen=True)
class Target:
    """One threshold to find: the ``count``-th largest |τ| of expert ``owner``."""

    owner: int
    count: int
    top: bool
    ties: int


@dataclass
class Numbers:
    """What a recipe says of one tensor: for the compiler (``kinds``, ``rule``) and for the device
    (``integers`` [6 K + 2], ``numbers`` [3 K + 3]; magic_fast/kernels/words.py names the rows)."""

    kinds: tuple[int, ...]
    rule: tuple[int, ...]
    integers: list[int]
    numbers: list[float]
    targets: list[Target] = field(default_factory=list)


def _kind(job: Job, k: int, n: int) -> int:
    trim = job.recipe.trim
    given = job.masks is not None and job.masks[k] is not None
    if given:
        return BYTES
    if trim.rule is TrimRule.GIVEN or not trim.active(k) or n == 0:
        return KEEP_ALL
    if trim.rule is TrimRule.RANDOM:
        return RANDOM
    if trim.rule is TrimRule.RANKED:
        return BYTES
    return BAND if trim.rule is TrimRule.BAND else ABOVE  # a threshold that is given, too


def _targets(recipe: Recipe, k: int, kind: int, n: int) -> tuple[list[Target], bool]:
    """Thresholds of expert ``k``, and whether it keeps everything after all."""
    trim = recipe.trim
    if kind == BAND:
        top, kept = trim.band_counts(k, n)
        wanted = [(top + kept, False), (top, True)] if kept else []
        return [Target(k, count, is_top, 0) for count, is_top in wanted if count > 0], False
    if trim.tie_rule is TieRule.DROP_ALL:
        dropped = math.trunc(float(n) * (1.0 - trim.density[k]))
        if dropped == 0:
            return [], True
        return [Target(k, n - dropped + 1, False, 2)], False
    count = trim.kept_count(k, n)
    return ([Target(k, count, False, _TIES[trim.tie_rule])] if count > 0 else []), False


def _factor(job: Job, k: int, n: int) -> float:
    """Factor of expert ``k`` that needs no sums: ÷ density where something is dropped."""
    recipe = job.recipe
    if recipe.rescale is not Rescale.KEEP_PROBABILITY:
        return 1.0
    given = job.masks is not None and job.masks[k] is not None
    drops = given or (recipe.trim.rule is not TrimRule.GIVEN and recipe.trim.active(k) and n != 0)
    return 1.0 / recipe.trim.density[k] if drops else 1.0


def numbers_of(job: Job) -> Numbers:
    """The recipe of one job. Thresholds of a selection that is given are filled in; the others are
    left for ``select`` on the device."""
    recipe, count = job.recipe, len(job.experts)
    total = job.experts[0].numel() if job.total is None else job.total
    selection = job.selection
    low, cut = [_INF_BITS] * count, [0] * count
    high, top_cut = [_INF_BITS] * count, [0] * count
    kinds: list[int] = []
    targets: list[Target] = []
    factors: list[float] = []
    for k in range(count):
        kind = _kind(job, k, total)
        factor = _factor(job, k, total)
        if selection is not None:
            factor = selection.factor[k]
            low[k], cut[k] = bits_of(selection.threshold[k]), selection.tie_cut[k]
            high[k], top_cut[k] = bits_of(selection.top_threshold[k]), selection.top_tie_cut[k]
        elif recipe.trim.rule is TrimRule.THRESHOLD and kind == ABOVE:
            low[k], cut[k] = bits_of(recipe.trim.epsilon[k]), 0
        elif kind in (ABOVE, BAND):
            found, everything = _targets(recipe, k, kind, total)
            targets += found
            if everything:
                kind = KEEP_ALL
        if kind not in (ABOVE, BAND) and selection is None:
            low[k], cut[k] = 0, total
        if kind == KEEP_ALL and recipe.align is not Align.NONE and total:
            kind = ABOVE  # 0, which keeps everything: what trims nothing has no factor
        kinds.append(kind)
        factors.append(factor)
    streams = [_signed(job.stream + k * _GOLDEN) for k in range(count)]
    density = recipe.trim.density or (1.0,) * count
    bounds = [math.floor(float(q) * 2.0**32) for q in density]
    majority = 0 if selection is None else selection.majority
    consensus = recipe.consensus
    lambdas = consensus.lambdas if consensus is not None and not consensus.given else (0.0,) * count
    return Numbers(
        kinds=tuple(kinds),
        rule=_rule(recipe, any(f != 1 for f in factors) or recipe.needs_factors),
        integers=[
            *(low + cut + high + top_cut + streams + bounds),
            *(_signed(recipe.trim.seed), majority),
        ],
        numbers=[
            *(*factors, *recipe.weights, *lambdas),
            *(recipe.scale, 0.0 if consensus is None else float(consensus.min_tasks)),
            recipe.limit or 0.0,
        ],
        targets=targets,
    )


def _rule(recipe: Recipe, factored: bool) -> tuple[int, ...]:
    consensus = recipe.consensus
    return (
        _VOTES[recipe.vote],
        _ZEROS[recipe.zero_vote],
        _WHO[recipe.contributors],
        _HOW[recipe.reduce],
        int(recipe.vote_on is VoteOn.UNWEIGHTED),
        int(factored),
        int(any(w != 1 for w in recipe.weights)),
        0 if consensus is None else 2 if consensus.given else 1,
        int(recipe.scale != 1),
        0,
        int(recipe.limit is not None),
    )


@dataclass
class Device:
    """One job on the device. ``search``: int64 [4 · targets], what a select works with: places of
    each bracket in the sorted sample, then ranks."""

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
        """Whether values are kept beside the task vectors: a trim or a vote."""
        return any(self.numbers.kinds) or self.numbers.rule[0] != 0

    @property
    def words(self) -> int:
        """Words that count kept entries, two experts each; 0 where nobody trims."""
        return (len(self.experts) + 1) // 2 if any(self.numbers.kinds) else 0

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
        like = integers.view(torch.uint8)
        ready.append(
            Device(
                job,
                numbers,
                integers[i : i + 6 * k + 2],
                floats[f : f + 3 * k + 3],
                _bytes(job.masks, like, k),
                _bytes(job.task_masks, like, k),
                integers[at : at + len(search)],
            )
        )
        at += len(search)
        i, f = i + 6 * k + 2, f + 3 * k + 3
    return ready


def sample_of(n: int) -> tuple[int, int]:
    """(runs, elements of each) of the sample of a tensor of ``n`` elements."""
    run = 1 if n <= SAMPLE else RUN
    return min(n, SAMPLE) // run, run


def search_words(targets: list[Target], job: Job) -> list[int]:
    n: int = job.experts[0].numel()
    if not targets or n == 0:
        return []
    runs, run = sample_of(n)
    return [*places_of(targets, runs * run, n), *(t.count for t in targets)]


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
    """Why the arrays of a job are none that kernels of a GPU take; None where they are."""
    arrays = [a for a in (job.base, job.out, *job.experts) if a is not None]
    if any(isinstance(a, View) for a in arrays):
        return "it takes torch tensors only"
    for a in arrays:
        if a.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it takes float32, float16 and bfloat16, not {a.dtype}"
        if not a.is_contiguous():
            return "it takes contiguous tensors only"
    for masks in (job.masks, job.task_masks):
        if masks is not None and not all(m is None or m.is_contiguous() for m in masks):
            return "it takes contiguous masks only"
    return "it does not keep masks and votes" if job.details else None

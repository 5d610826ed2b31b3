"""What a merge needs to know of a whole tensor first: thresholds and tie cuts, masks of trims by
rank, norm factors, what the experts hold together, the majority sign.

:func:`prepare` runs the sequence over the reads of a backend (:class:`Scans`). Nothing waits for
the device, but for one number where a trim goes by the variance. The formulas are those of
magic_fast/reference/shares.py, on tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from magic_fast.ops.gpu.jobs import SAMPLE, SORT_BYTES, Device, sample_of, search_words
from magic_fast.ops.gpu.numbers import Target
from magic_fast.recipe import Align, Rescale, TrimRule
from magic_fast.recipe.codes import TIE_RULES, Floats, GpuTrim, Integers, Key, place_of
from magic_fast.recipe.words import TieRule

_RANKED_ELEMENTS = 1 << 22  # sorted at a time: bounds the sort's workspace to some 64 MiB
_RANKED_BYTES = 64 << 20
_POWERS = {Rescale.L1: 1, Rescale.L2: 2, Rescale.LINF: 0}  # 0: the largest
_TINY_NORM = 1e-7  # below it a norm is not restored
_ZERO_SCORE = 1 << 30  # the key of a score of 0; one of −0 is the key below


@dataclass(frozen=True)
class Search:
    """Thresholds to find in one tensor, each bracketed by a sorted sample of ``runs`` runs of
    ``run`` neighbours, of ``sampled`` kinds of keys (K experts; 1: the variance)."""

    targets: list[Target]
    key: int  # of codes.Key
    words: Tensor  # int64: search_words of the targets, on the device
    sampled: int
    runs: int
    run: int

    @property
    def size(self) -> int:
        return self.runs * self.run


class Scans(ABC):
    """The reads of one job's whole tensor, queued on the current stream."""

    def __init__(self, d: Device) -> None:
        self.d = d

    @abstractmethod
    def find(self, search: Search, into: Tensor) -> None:
        """Thresholds and cuts of ``search`` into rows of ``into``, as in the integers of a job."""

    @abstractmethod
    def search_bytes(self, targets: int) -> int:
        """Bytes that a search for so many thresholds takes beside its sample."""

    @abstractmethod
    def varying(self) -> int:
        """How many entries have a variance other than 0. Waits for the device."""

    @abstractmethod
    def norm_sums(self, of: Device, power: int) -> Tensor:
        """float64 [programs, K, 2]: Σ|τ|^power before and after the trim of the experts of ``of``
        that lose something (power 0: the largest |τ|)."""

    @abstractmethod
    def held(self) -> Tensor:
        """int64 [K, 2]: entries that each expert holds alone, and with others."""

    @abstractmethod
    def votes(self) -> Tensor:
        """int64 []: the sum of the elected signs, zero votes as 0."""

    @abstractmethod
    def magnitudes(self, expert: int, part: slice) -> Tensor:
        """int32 [elements of ``part``]: bits of |τ| of one expert."""

    @abstractmethod
    def keep_ranked(self, expert: int, part: slice, order: Tensor, mask: Tensor) -> None:
        """Coins by rank: uint8 ``mask`` of ``part``, whose rows ``order`` sorts (int64
        [rows, cols])."""

    @abstractmethod
    def mask_varied(self) -> None:
        """Makes masks of the bounds of a trim by variance, which are known, where the kernels want
        them."""


def prepare(d: Device, scans: Scans) -> None:
    """Runs what the recipe needs of the whole tensor; results go into the device's numbers and
    masks."""
    recipe = d.job.recipe
    if d.n == 0:
        return
    if recipe.trim.rule is TrimRule.RANKED:
        _mask_by_rank(d, scans)
    if d.job.selection is not None:
        if recipe.needs_variance:
            scans.mask_varied()
        return
    if d.numbers.targets:
        _find(scans, d.numbers.targets, d.search, Key.MAGNITUDE, d.integers)
    for phase, needed in recipe.phases.items():
        if needed:
            _PHASES[phase](d, scans)


def workspace_bytes(d: Device, scans: Scans) -> int:
    """Bytes that :func:`prepare` takes: samples and what a search works with; masks of a trim by
    rank, and the sorts that they come of."""
    total, recipe = 0, d.job.recipe
    if d.n and (d.numbers.targets or recipe.needs_variance):
        total += SORT_BYTES * len(d.experts) * min(SAMPLE, d.n)
        total += scans.search_bytes(len(d.numbers.targets) or 1)
    if recipe.trim.rule is TrimRule.RANKED:
        total += d.numbers.kinds.count(GpuTrim.BYTES) * d.n + _RANKED_BYTES
    return total


def _find(scans: Scans, targets: list[Target], words: Tensor, key: int, into: Tensor) -> None:
    sampled = 1 if key == Key.VARIANCE else len(scans.d.experts)
    scans.find(Search(targets, key, words, sampled, *sample_of(scans.d.n)), into)


def _found(scans: Scans, targets: list[Target], key: int) -> Tensor:
    """int64, rows as of the integers of a job: thresholds and cuts of targets that no job has."""
    into = torch.zeros_like(scans.d.integers)
    words = torch.tensor(search_words(targets, scans.d.job), dtype=torch.int64)
    _find(scans, targets, words.to(into.device, non_blocking=True), key, into)
    return into


# ---- trims by rank ----
def _mask_by_rank(d: Device, scans: Scans) -> None:
    """Keep masks of the experts that coins by rank decide, one byte an element. The sort of the
    rows is torch's: a radix sort of whole rows on the device is a solved problem."""
    given, shape = d.job.masks, d.job.experts[0].shape
    cols = d.n if len(shape) < 2 else d.n // int(shape[0])
    step = max(1, _RANKED_ELEMENTS // cols) * cols
    masks = list(d.masks)
    for i, kind in enumerate(d.numbers.kinds):
        if kind != GpuTrim.BYTES or (given is not None and given[i] is not None):
            continue
        masks[i] = torch.empty(d.n, dtype=torch.uint8, device=d.base.device)
        for start in range(0, d.n, step):
            part = slice(start, min(start + step, d.n))
            bits = scans.magnitudes(i, part).view(-1, cols)
            order = torch.sort(bits, dim=1, stable=True).indices
            scans.keep_ranked(i, part, order, masks[i][part])
    d.masks = tuple(masks)


# ---- the phases of a recipe ----
def _variance(d: Device, scans: Scans) -> None:
    """Bounds of the entries of the largest variance, the same for all experts."""
    k = len(d.experts)
    count = math.trunc(float(scans.varying()) * d.job.recipe.trim.density[0])
    if count:  # else the bounds keep nothing as they are
        found = _found(scans, [Target(0, count, False, TIE_RULES[TieRule.EXACT])], Key.VARIANCE)
        d.row(d.integers, Integers.LOW).fill_(found[place_of(Integers.LOW, k)])
        d.row(d.integers, Integers.CUT).fill_(found[place_of(Integers.CUT, k)])
    scans.mask_varied()


def _factors(d: Device, scans: Scans) -> None:
    """What each expert is multiplied by: norms restored after a trim, an alignment."""
    recipe, factors = d.job.recipe, d.row(d.floats, Floats.FACTOR)
    if recipe.restores and any(kind != GpuTrim.ALL for kind in d.numbers.kinds):
        power = _POWERS[recipe.rescale]
        factors.copy_(_restored(scans.norm_sums(d, power), power))
    if recipe.align is not Align.NONE:
        _align(factors, scans.norm_sums(_whole(d), 2)[..., 0])


def _restored(partial: Tensor, power: int) -> Tensor:
    """float32 [K]: norm before ÷ norm after the trim, from ``partial`` float64 [programs, K, 2]
    sums of |τ|^power (0: the largest |τ|)."""
    sums = partial.amax(0) if power == 0 else partial.sum(0)
    before, after = (sums.sqrt() if power == 2 else sums).unbind(1)
    usable = (before >= _TINY_NORM) & (after >= _TINY_NORM)
    return torch.where(usable, before / after, torch.ones_like(before)).float()


def _whole(d: Device) -> Device:
    """The job as if a trim kept everything: sums over its trimmed values are over whole ones."""
    above = replace(d, integers=d.integers.clone())
    above.row(above.integers, Integers.LOW).fill_(0)
    above.row(above.integers, Integers.CUT).fill_(d.job.offset + d.n)
    kinds = (GpuTrim.ABOVE,) * len(d.experts)
    return replace(above, numbers=replace(d.numbers, kinds=kinds))


def _align(factors: Tensor, squares: Tensor) -> None:
    """The factors × smallest length other than 0 ÷ own length, in place. ``squares``: float64
    [programs, K] sums of τ²."""
    lengths = squares.sum(0).sqrt()
    shortest = torch.where(lengths > 0, lengths, torch.inf).amin()
    shorter = (factors.double() * shortest / lengths).float()
    factors.copy_(torch.where((lengths == 0) | (lengths == shortest), factors, shorter))


def _weights(d: Device, scans: Scans) -> None:
    """Mean squares of the trimmed task vectors as shares of their sum, equal ones where there is
    nothing to share or less than ``least``."""
    least = d.job.recipe.least
    # where nothing is trimmed the bounds are those of a trim that keeps everything
    kinds = tuple(GpuTrim.ABOVE if kind == GpuTrim.ALL else kind for kind in d.numbers.kinds)
    trimmed = replace(d, numbers=replace(d.numbers, kinds=kinds))
    after = scans.norm_sums(trimmed, 2)[..., 1].sum(0)
    means = after * d.row(d.floats, Floats.FACTOR).double().square() / d.n
    total = means.sum()
    equal = torch.full_like(means, 1 / len(d.experts))
    shares = torch.where((total == 0) | (total < least), equal, means / total)
    d.row(d.floats, Floats.WEIGHT).copy_(shares.float())


def _scores(d: Device, scans: Scans) -> None:
    """The score of every expert up to which scores count as nothing, and the largest."""
    k, trim, keeps = len(d.experts), d.job.recipe.trim, TIE_RULES[TieRule.KEEP_ALL]
    targets = []
    for i in range(k):
        count = d.n - trim.score_index(i, d.n)
        targets += [Target(i, count, False, keeps), Target(i, 1, True, keeps)]
    low, _, high, _ = _found(scans, targets, Key.SCORE)[: 4 * k].view(4, k)
    d.row(d.floats, Floats.SCORE_CUT).copy_(scores_of(low))
    d.row(d.floats, Floats.SCORE_TOP).copy_(scores_of(high))


def scores_of(keys: Tensor) -> Tensor:
    """float32 scores from the keys that order as they do (int64): bits of |P|, upwards from that of
    0 or downwards from that of −0.

    >>> scores_of(torch.tensor([(1 << 30) + 0x3F000000, (1 << 30) - 1 - 0x3F000000])).tolist()
    [0.5, -0.5]
    """
    positive = keys >= _ZERO_SCORE
    bits = torch.where(positive, keys - _ZERO_SCORE, _ZERO_SCORE - 1 - keys)
    size = bits.to(torch.int32).view(torch.float32)
    return torch.where(positive, size, -size)


def _alone(d: Device, scans: Scans) -> None:
    """1 + r·clamp(shared ÷ max(unique, ε), 0, alpha) of every expert."""
    rule = d.job.recipe.alone
    assert rule is not None
    unique, shared = scans.held().double().unbind(1)
    ratio = shared / unique.clamp(min=rule.epsilon or 1.0)
    d.row(d.floats, Floats.ALONE).copy_((1.0 + rule.r * ratio.clamp(0.0, rule.alpha)).float())


def _majority(d: Device, scans: Scans) -> None:
    place = place_of(Integers.MAJORITY, len(d.experts))
    d.integers[place] = torch.sign(scans.votes())


def _nothing(d: Device, scans: Scans) -> None:
    """The search of ``scores`` has found both bounds at once."""


#: How each phase of :attr:`~magic_fast.recipe.Recipe.phases` is found.
_PHASES = {
    "variance": _variance,
    "factors": _factors,
    "weights": _weights,
    "scores": _scores,
    "scores_rest": _nothing,
    "alone": _alone,
    "majority": _majority,
}

"""What the experts of an entry hold together, found on the device before a merge: the bounds of a
trim by variance, weights by energy, factors of what one expert alone holds, bounds of the scores.
The formulas are those of magic_fast/reference/shares.py, on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from magic_fast.ops.gpu.jobs import Device
from magic_fast.ops.gpu.numbers import (
    ABOVE,
    ALONE_ROW,
    CUT_ROW,
    KEEP_ALL,
    TOP_ROW,
    WEIGHT_ROW,
    Target,
)

#: What a search compares (magic_fast/kernels/keys.py): |τ| of an expert, the variance over all of
#: them, the score of an expert's entry.
MAGNITUDE, VARIANCE, SCORE = range(3)
_ZERO_SCORE = 1 << 30  # the key of a score of 0; one of −0 is the key below

#: find(targets, key, into): thresholds and cuts of ``targets`` into rows of ``into``, as in the
#: integers of a job.
Find = Callable[[list[Target], int, Tensor], None]


def find_varied(d: Device, varying: int, find: Find) -> None:
    """Bounds of the entries of the largest variance, the same for all experts.

    Args:
        varying: entries whose variance is not 0.
    """
    k = len(d.experts)
    count = math.trunc(float(varying) * d.job.recipe.trim.density[0])
    if count == 0:
        return  # the bounds keep nothing as they are
    found = torch.zeros_like(d.integers)
    find([Target(0, count, False, 0)], VARIANCE, found)
    d.integers[:k] = found[0]
    d.integers[k : 2 * k] = found[k]


def find_weights(d: Device, norm_sums: Callable[[Device, int], Tensor]) -> None:
    """Mean squares of the trimmed task vectors as shares of their sum, equal ones where there is
    nothing to share or less than ``least``.

    Args:
        norm_sums: see :func:`~magic_fast.ops.gpu.factors.find_factors`.
    """
    k, least = len(d.experts), d.job.recipe.least
    # where nothing is trimmed the bounds are those of a trim that keeps everything
    kinds = tuple(ABOVE if kind == KEEP_ALL else kind for kind in d.numbers.kinds)
    trimmed = replace(d, numbers=replace(d.numbers, kinds=kinds))
    squares = norm_sums(trimmed, 2)[..., 1].sum(0) * d.floats[:k].double().square()
    means = squares / d.n
    total = means.sum()
    shares = torch.where(
        (total == 0) | (total < least), torch.full_like(means, 1 / k), means / total
    )
    _row(d, WEIGHT_ROW).copy_(shares.float())


def find_alone(d: Device, held: Tensor) -> None:
    """1 + r·clamp(shared ÷ max(unique, ε), 0, alpha) of every expert.

    Args:
        held: int64 [K, 2], entries that an expert holds alone, and with others.
    """
    rule = d.job.recipe.alone
    assert rule is not None
    unique, shared = held.double().unbind(1)
    ratio = shared / unique.clamp(min=rule.epsilon or 1.0)
    _row(d, ALONE_ROW).copy_((1.0 + rule.r * ratio.clamp(0.0, rule.alpha)).float())


def find_scores(d: Device, find: Find) -> None:
    """The score of every expert up to which scores count as nothing, and the largest."""
    k, trim = len(d.experts), d.job.recipe.trim
    targets = []
    for i in range(k):
        count = d.n - trim.score_index(i, d.n)
        targets += [Target(i, count, False, 1), Target(i, 1, True, 1)]
    found = torch.zeros_like(d.integers)
    find(targets, SCORE, found)
    _row(d, CUT_ROW).copy_(scores_of(found[:k]))
    _row(d, TOP_ROW).copy_(scores_of(found[2 * k : 3 * k]))


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


def _row(d: Device, row: int) -> Tensor:
    k = len(d.experts)
    return d.floats[row * k : (row + 1) * k]

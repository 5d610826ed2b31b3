"""Trimming one task vector: which entries stay, by every rule of docs/methods.md, in plain
PyTorch.

Magnitudes are compared as bit patterns of |x|, which order like the numbers do; NaN comes above
infinity, so under ``nonfinite="propagate"`` a NaN is never trimmed silently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from magic_fast.recipe import Recipe, Rescale, TieRule, Trim, TrimRule
from magic_fast.reference.philox import random_keep

_TINY_NORM = 1e-7  # below it a norm is not restored
_DIGIT_BITS = 16


def magnitude_bits(x: Tensor) -> Tensor:
    """Bit patterns of |x| as integers that order like |x|: int32 for float32, int64 for float64."""
    return x.abs().view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def _bits_of(value: float, like: Tensor) -> Tensor:
    dtype = torch.float32 if like.dtype == torch.int32 else torch.float64
    return torch.tensor(value, dtype=dtype, device=like.device).view(like.dtype)


def kth_magnitude(x: Tensor, k: int) -> float:
    """The k-th largest |x| (k from 1), exactly. ``x``: float32 or float64, any shape."""
    bits = magnitude_bits(x.flatten())
    value = torch.kthvalue(bits, bits.numel() - k + 1).values
    return float(value.view(x.dtype))


def threshold_and_cut(x: Tensor, count: int, tie_rule: TieRule) -> tuple[float, int]:
    """(threshold, tie cut) that keep the ``count`` largest |x|; see
    :class:`~magic_fast.recipe.Selection`."""
    n = x.numel()
    if count <= 0:
        return math.inf, 0
    threshold = kth_magnitude(x, count)
    if tie_rule is TieRule.KEEP_ALL:
        return threshold, n
    if tie_rule is TieRule.DROP_ALL:
        return threshold, 0
    bits = magnitude_bits(x.flatten())
    limit = _bits_of(threshold, bits)
    needed = count - int((bits > limit).sum())
    return threshold, int((bits == limit).nonzero()[needed - 1]) + 1


def keep_above(x: Tensor, threshold: float, tie_cut: int, offset: int = 0) -> Tensor:
    """bool, shape of ``x``: entries above the threshold, and equal ones of flat index <
    ``tie_cut``."""
    bits = magnitude_bits(x).contiguous()  # the cut counts row-major, whatever the strides
    limit = _bits_of(threshold, bits)
    keep = bits > limit
    if tie_cut - offset >= x.numel():
        return keep | (bits == limit)
    if tie_cut - offset <= 0:
        return keep
    flat, equal = keep.view(-1), (bits == limit).view(-1)
    flat[: tie_cut - offset] |= equal[: tie_cut - offset]
    return keep


def select_trim(x: Tensor, trim: Trim, k: int) -> tuple[float, int, float, int]:
    """(threshold, tie_cut, top_threshold, top_tie_cut) of expert ``k`` with task vector ``x``."""
    n = x.numel()
    everything = (0.0, n, math.inf, 0)
    if trim.rule is TrimRule.THRESHOLD:
        return trim.epsilon[k], 0, math.inf, 0
    if n == 0 or not trim.active(k) or not trim.by_magnitude:
        return everything
    if trim.rule is TrimRule.COMPETE:
        low_rank, high_rank = trim.tail_ranks(n)
        return kth_magnitude(x, low_rank), n, kth_magnitude(x, high_rank), 0
    if trim.rule is TrimRule.BAND:
        top, kept = trim.band_counts(k, n)
        if kept == 0:
            return math.inf, 0, math.inf, 0
        low = threshold_and_cut(x, top + kept, TieRule.EXACT)
        high = threshold_and_cut(x, top, TieRule.EXACT)
        return (*low, *high)
    if trim.tie_rule is TieRule.DROP_ALL:
        dropped = trim.drop_count(k, n)
        if dropped == 0:
            return everything
        return kth_magnitude(x, n - dropped + 1), 0, math.inf, 0
    return (*threshold_and_cut(x, trim.kept_count(k, n), trim.tie_rule), math.inf, 0)


def variance(taus: Sequence[Tensor]) -> Tensor:
    """Biased variance of each entry over the experts, summed in their order."""
    mean = torch.zeros_like(taus[0])
    for t in taus:
        mean += t
    mean /= len(taus)
    found = torch.zeros_like(mean)
    for t in taus:
        found += (t - mean).square()
    return found / len(taus)


def select_variance(taus: Sequence[Tensor], trim: Trim) -> tuple[float, int, float, int]:
    """Bounds of the ⌊q·#(variance ≠ 0)⌋ entries of the largest variance, equal ones by index."""
    found = variance(taus)
    count = math.trunc(float(torch.count_nonzero(found)) * trim.density[0])
    return (*threshold_and_cut(found, count, TieRule.EXACT), math.inf, 0)


def ranked_probability(x: Tensor, density: float, epsilon: float, along_dim1: bool) -> Tensor:
    """DELLA's keep probability, float64, shape of ``x``: (q−ε) + 2ε·(rank−1)/(c−1), rank 1 the
    smallest |x| of its row, equal ones by index; a row of one element keeps with probability q."""
    if x.dim() < 2 or x.numel() == 0:
        rows = x.reshape(1, -1)
    elif along_dim1:
        rows = x.movedim(1, -1)
    else:
        rows = x.reshape(x.shape[0], -1)
    c = rows.shape[-1]
    if c <= 1:
        return torch.full(x.shape, density, dtype=torch.float64, device=x.device)
    order = torch.sort(magnitude_bits(rows.contiguous()), dim=-1, stable=True).indices
    ranks = torch.empty_like(order)
    ranks.scatter_(-1, order, torch.arange(c, device=x.device).expand_as(order))
    p = (density - epsilon) + 2 * epsilon * ranks.double() / (c - 1)
    if x.dim() >= 2 and along_dim1:
        return p.movedim(-1, 1)
    return p.reshape(x.shape)


def keep_probabilities(taus: Sequence[Tensor], trim: Trim) -> list[float | Tensor] | None:
    """Chance of every entry to stay: a number per expert, a tensor under DELLA; None where no coin
    decides."""
    if trim.rule not in (TrimRule.RANDOM, TrimRule.RANKED):
        return None
    if trim.rule is TrimRule.RANDOM:
        return list(trim.density)
    return [
        ranked_probability(x, trim.density[k], trim.epsilon[k], trim.rank_dim1)
        if trim.active(k)
        else 1.0
        for k, x in enumerate(taus)
    ]


def _keep_norm_fraction(x: Tensor, t: float) -> Tensor:
    """Shortest prefix by x²/‖x‖² (descending) whose sum reaches ``t``; the crossing entry and, as
    the original code has it, the last column stay."""
    flat = x.flatten()
    share = flat.square() / flat.square().sum()
    ordered = torch.sort(share, descending=True, stable=True)
    reached = torch.cumsum(ordered.values, 0) >= t
    crossing = int(reached.nonzero()[0]) if bool(reached.any()) else flat.numel() - 1
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[ordered.indices[: crossing + 1]] = True
    keep[-1] = True
    return keep.view(x.shape)


def keep_mask(
    x: Tensor,
    trim: Trim,
    k: int,
    *,
    bounds: tuple[float, int, float, int],
    stream: int = 0,
    offset: int = 0,
    given: Tensor | None = None,
) -> Tensor | None:
    """bool keep mask of expert ``k`` (task vector ``x``), or None where everything stays.

    ``given`` replaces the draw of a random or ranked trim and is the mask of ``TrimRule.GIVEN``
    and of ``VARIANCE``, which looks at all experts.
    """
    if given is not None:
        return given.to(torch.bool).reshape(x.shape)
    everything = trim.rule in (TrimRule.GIVEN, TrimRule.COMPETE) or not trim.active(k)
    if everything or x.numel() == 0:
        return None
    assert trim.rule is not TrimRule.VARIANCE
    if trim.by_magnitude or trim.rule is TrimRule.THRESHOLD:
        threshold, cut, top_threshold, top_cut = bounds
        keep = keep_above(x, threshold, cut, offset)
        if trim.rule is TrimRule.BAND:
            keep &= ~keep_above(x, top_threshold, top_cut, offset)
        return keep
    if trim.rule is TrimRule.STD:
        flat = x.flatten()
        return ((flat - flat.mean()).abs() > trim.density[k] * flat.std()).view(x.shape)
    if trim.rule is TrimRule.NORM_FRACTION:
        return _keep_norm_fraction(x, trim.density[k])
    if trim.rule is TrimRule.RANKED:
        chance: float | Tensor = ranked_probability(
            x, trim.density[k], trim.epsilon[k], trim.rank_dim1
        ).flatten()
    else:
        chance = trim.density[k]
    mask = random_keep(
        x.numel(), chance, seed=trim.seed, stream=stream, expert=k, offset=offset, device=x.device
    )
    return mask.view(x.shape)


def tensor_norm(x: Tensor, rescale: Rescale) -> float:
    """L1, L2 or L∞ of the whole tensor, summed in float64."""
    if x.numel() == 0:
        return 0.0
    if rescale is Rescale.L1:
        return float(x.abs().sum(dtype=torch.float64))
    if rescale is Rescale.L2:
        return math.sqrt(float(x.double().square().sum()))
    return float(x.abs().max())


def rescale_factor(x: Tensor, keep: Tensor | None, recipe: Recipe, k: int) -> float:
    """What the kept entries of expert ``k`` are multiplied by, rounded once to float32."""
    if keep is None or recipe.rescale is Rescale.NONE:
        return 1.0
    if recipe.rescale is Rescale.KEEP_PROBABILITY:
        factor = 1.0 / recipe.trim.density[k]
    else:
        before = tensor_norm(x, recipe.rescale)
        after = tensor_norm(x * keep, recipe.rescale)
        factor = before / after if before >= _TINY_NORM and after >= _TINY_NORM else 1.0
    return float(torch.tensor(factor, dtype=torch.float32 if x.dtype == torch.float32 else x.dtype))


class RadixSelect:
    """The bit pattern of the ``rank``-th largest magnitude (from 1) of data that is read several
    times, by counting digits; feed every value once a pass."""

    def __init__(self, rank: int, bits: int) -> None:
        self.rank = rank  # among the values that share the prefix
        self.shift = bits
        self.prefix = 0
        self._counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)

    @property
    def done(self) -> bool:
        return self.shift == 0

    def add(self, pattern: Tensor) -> None:
        """Counts the next digit of the patterns that share the prefix found so far."""
        flat = pattern.flatten()
        flat = flat[(flat >> self.shift) == self.prefix] if self.prefix or self.shift < 63 else flat
        digit = (flat >> (self.shift - _DIGIT_BITS)) & ((1 << _DIGIT_BITS) - 1)
        self._counts += torch.bincount(digit.to(torch.int64), minlength=1 << _DIGIT_BITS).cpu()

    def next_digit(self) -> None:
        """Ends a pass: fixes one more digit."""
        from_top = self._counts.flip(0).cumsum(0)
        place = int((from_top >= self.rank).nonzero()[0])
        digit = (1 << _DIGIT_BITS) - 1 - place
        if place:
            self.rank -= int(from_top[place - 1])
        self.prefix = (self.prefix << _DIGIT_BITS) | digit
        self.shift -= _DIGIT_BITS
        self._counts.zero_()

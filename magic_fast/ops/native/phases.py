"""What a recipe needs to know of a whole tensor beside thresholds, a pass for each: the bounds of
a trim by variance, factors, weights, scores, who holds what alone, the majority sign."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from magic_fast.ops.job import Job
from magic_fast.ops.native.arrays import numel_of
from magic_fast.ops.native.jobs import Call
from magic_fast.recipe import (
    Align,
    Recipe,
    Rescale,
    Selection,
    TrimRule,
    Weigh,
    ZeroVote,
)
from magic_fast.reference import shares

try:
    from magic_fast import _native
except ImportError:  # the backend tells it
    pass

_BLOCK = 65536  # elements; sums over a tensor are float64 partials of so many, added in order
_DIGITS = 1 << 16
_TINY_NORM = 1e-7  # below it a norm is not restored


def thresholds_only(recipe: Recipe) -> Recipe:
    """The recipe without whatever a phase finds: what a search looks for."""
    keeps = recipe.rescale is Rescale.KEEP_PROBABILITY
    return replace(
        recipe,
        rescale=recipe.rescale if keeps else Rescale.NONE,
        align=Align.NONE,
        zero_vote=ZeroVote.POSITIVE if recipe.needs_majority else recipe.zero_vote,
        weigh=recipe.weigh if recipe.weigh is Weigh.SCORE else Weigh.GIVEN,
        alone=None,
    )


def of_nothing(recipe: Recipe, selection: Selection) -> Selection:
    """What the phases find in a tensor without elements: no expert holds more than another."""
    k = recipe.num_experts
    if recipe.needs_variance:  # none of nothing is kept
        selection = replace(selection, threshold=(math.inf,) * k)
    if recipe.weigh is Weigh.ENERGY:
        found = shares.energy_weights([0.0] * k, recipe.least)
        selection = replace(selection, weights=tuple(shares.single(w) for w in found))
    if recipe.weigh is Weigh.SCORE:
        selection = replace(selection, score_cut=(0.0,) * k, score_top=(0.0,) * k)
    if recipe.alone is not None:
        factor = shares.single(shares.alone_factor(recipe.alone, 0, 0))
        selection = replace(selection, alone=(factor,) * k)
    return selection


class ScoreCounts:
    """The bounds of the scores of every expert, by counting the halves of their bit patterns: two
    passes over the data.

    Args:
        recipe: of all the data.
        total: elements of all the data, > 0.
    """

    def __init__(self, recipe: Recipe, total: int) -> None:
        k = recipe.num_experts
        self._ranks = [recipe.trim.score_index(e, total) for e in range(k)]  # ascending, from 0
        self._prefix: list[int] = []
        self._counts = array("q", bytes(8 * k * _DIGITS))
        self._top = array("I", bytes(4 * k))

    def feed(self, piece: _native.JobFields, threads: int, isa: int) -> None:
        counts, top = self._counts.buffer_info()[0], self._top.buffer_info()[0]
        _native.score_counts(piece, self._prefix, counts, top, threads, isa)

    def end(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Ends a pass. (Cuts, tops), after the second."""
        import numpy as np

        counts = np.frombuffer(self._counts, np.int64).reshape(-1, _DIGITS)
        sums = counts.cumsum(axis=1)
        digits = [
            int(np.searchsorted(row, r, "right")) for row, r in zip(sums, self._ranks, strict=True)
        ]
        if self._prefix:
            cuts = [(p << 16) | d for p, d in zip(self._prefix, digits, strict=True)]
            return tuple(map(_float_of, cuts)), tuple(map(_float_of, self._top))
        before = [int(row[d - 1]) if d else 0 for row, d in zip(sums, digits, strict=True)]
        self._ranks = [r - b for r, b in zip(self._ranks, before, strict=True)]
        self._prefix = digits
        self._counts = array("q", bytes(8 * len(digits) * _DIGITS))
        return (), ()


def _float_of(ordered: int) -> float:
    """The float32 whose bits, in an order that unsigned numbers have too, are these."""
    bits = ordered ^ (0x80000000 if ordered >> 31 else 0xFFFFFFFF)
    found: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return found


class _Piece(NamedTuple):
    """Data of a pass, as the native core takes it, and what was known before the pass."""

    fields: _native.JobFields
    offset: int
    numel: int
    selection: Selection


_Known = Callable[[], Selection]  # what a pass found, once all the data was fed


class Phases:
    """The passes of one recipe, in order; each is fed all of the data, in any order and cut, whole
    blocks of 65536 elements but for the last of a tensor (by variance: a whole tensor at once).

    Args:
        recipe: of all the data.
        total: elements of all the data.
        threads, isa: as of :class:`~magic_fast.ops.native.backend.NativeBackend`.
    """

    def __init__(self, recipe: Recipe, total: int, threads: int, isa: int) -> None:
        self._recipe, self._total = recipe, total
        self._options = threads, isa
        self._left = [p for p, needed in recipe.phases.items() if needed and total > 0]
        self._fed = 0
        self._sums: list[tuple[int, tuple[Any, ...]]] = []  # offset, arrays
        self._counts: list[int] = []
        self._scores_found: ScoreCounts | None = None

    @property
    def pending(self) -> bool:
        return bool(self._left)

    def feed(self, job: Job, selection: Selection) -> Selection:
        """One piece. Returns what is known then."""
        job = replace(job, selection=selection, calibration=None)
        fields, numel = Call().job(job, total=self._total), numel_of(job.experts[0])
        found = getattr(self, "_" + self._left[0])(_Piece(fields, job.offset, numel, selection))
        self._fed += numel
        if self._fed < self._total:
            return selection
        self._fed = 0
        self._left.pop(0)
        known: Selection = found()
        self._sums, self._counts = [], []
        return known

    # Each takes a piece in and returns what to call after the last.
    def _variance(self, one: _Piece) -> _Known:
        k = self._recipe.num_experts
        threshold, cut = _native.select_variance(
            one.fields, self._recipe.trim.density[0], *self._options
        )
        return lambda: replace(one.selection, threshold=(threshold,) * k, tie_cut=(cut,) * k)

    def _factors(self, one: _Piece) -> _Known:
        before, after, squares = (self._room(one.numel) for _ in range(3))
        aligns = self._recipe.align is not Align.NONE
        _native.norm_sums(
            one.fields,
            before.buffer_info()[0],
            after.buffer_info()[0],
            squares.buffer_info()[0] if aligns else 0,
            *self._options,
        )
        self._sums.append((one.offset, (before, after, squares)))
        return lambda: replace(one.selection, factor=self._all_factors(one.selection))

    def _weights(self, one: _Piece) -> _Known:
        squares = self._room(one.numel)
        _native.energies(one.fields, squares.buffer_info()[0], *self._options)
        self._sums.append((one.offset, (squares,)))

        def weights() -> Selection:
            means = [x / self._total for x in self._added(0)]
            found = shares.energy_weights(means, self._recipe.least)
            return replace(one.selection, weights=tuple(shares.single(w) for w in found))

        return weights

    def _alone(self, one: _Piece) -> _Known:
        k = self._recipe.num_experts
        alone, shared = array("q", bytes(8 * k)), array("q", bytes(8 * k))
        _native.holders(one.fields, alone.buffer_info()[0], shared.buffer_info()[0], *self._options)
        here = [*alone, *shared]
        self._counts = [x + y for x, y in zip(self._counts or [0] * 2 * k, here, strict=True)]

        def factors() -> Selection:
            rule = self._recipe.alone
            assert rule is not None
            pairs = zip(self._counts[:k], self._counts[k:], strict=True)
            found = tuple(shares.single(shares.alone_factor(rule, a, s)) for a, s in pairs)
            return replace(one.selection, alone=found)

        return factors

    def _scores(self, one: _Piece) -> _Known:
        if self._scores_found is None:
            self._scores_found = ScoreCounts(self._recipe, self._total)
        counts = self._scores_found
        counts.feed(one.fields, *self._options)

        def bounds() -> Selection:
            cut, top = counts.end()
            if not cut:  # the upper halves of the bits are known
                return one.selection
            k = self._recipe.num_experts  # nothing drops out, so nothing is cut among equals
            return replace(
                one.selection, tie_cut=(self._total,) * k, top_tie_cut=(0,) * k,
                score_cut=cut, score_top=top,
            )  # fmt: skip

        return bounds

    _scores_rest = _scores  # the same again, for the lower halves

    def _majority(self, one: _Piece) -> _Known:
        votes = _native.vote_sum(one.fields, *self._options)
        self._counts = [sum(self._counts) + votes]

        def majority() -> Selection:
            (sum_,) = self._counts
            return replace(one.selection, majority=(sum_ > 0) - (sum_ < 0))

        return majority

    # ---- sums ----
    def _room(self, numel: int) -> Any:
        return array("d", bytes(8 * self._recipe.num_experts * -(-numel // _BLOCK)))

    def _added(self, which: int, *, largest: bool = False) -> Sequence[float]:
        """[K] of block sums of all pieces, in the order of the elements."""
        k = self._recipe.num_experts
        self._sums.sort(key=lambda entry: entry[0])
        totals = [0.0] * k
        for _, arrays in self._sums:
            for expert in range(k):
                for x in arrays[which][expert::k]:
                    totals[expert] = max(totals[expert], x) if largest else totals[expert] + x
        return totals

    def _all_factors(self, selection: Selection) -> tuple[float, ...]:
        recipe = self._recipe
        found = list(selection.factor)
        if recipe.rescale not in (Rescale.NONE, Rescale.KEEP_PROBABILITY):
            largest, square = recipe.rescale is Rescale.LINF, recipe.rescale is Rescale.L2
            sums = [self._added(which, largest=largest) for which in (0, 1)]
            for k, (before, after) in enumerate(zip(*sums, strict=True)):
                if square:
                    before, after = math.sqrt(before), math.sqrt(after)
                trimmed = recipe.trim.active(k) or recipe.trim.rule is TrimRule.GIVEN
                usable = trimmed and before >= _TINY_NORM and after >= _TINY_NORM
                found[k] = shares.single(before / after) if usable else 1.0
        if recipe.align is Align.NONE:
            return tuple(found)
        lengths = [math.sqrt(x) for x in self._added(2)]
        return tuple(shares.single(f) for f in shares.aligned(found, lengths))

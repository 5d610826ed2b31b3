"""Magnitude trim over a whole model at once, as in the original TIES paper: one threshold per
expert over all merged tensors, names sorted, row-major, the flat index running through (see
docs/methods.md).

The thresholds are found by counting 16-bit digits of the bit patterns of |τ|, most significant
first, so nothing is held but the counts: two reads of the models (four for float64), one more where
ties are cut exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from magic_fast.recipe import Recipe, Selection, TieRule, TrimRule, Weigh
from magic_fast.reference import merge as reference
from magic_fast.reference import pcb
from magic_fast.reference.trim import RadixSelect, magnitude_bits

Pair = tuple[Tensor | None, Sequence[Tensor]]
Source = Callable[[], Iterable[Pair]]

_NOTHING = (math.inf, 0)


def _wanted(recipe: Recipe, k: int, n: int) -> list[tuple[int, TieRule]]:
    """(rank, tie rule) of the one or two thresholds of expert ``k``; rank 0 keeps nothing."""
    trim = recipe.trim
    if trim.rule is TrimRule.COMPETE:
        return [(rank, TieRule.KEEP_ALL) for rank in trim.tail_ranks(n)]
    if trim.rule is TrimRule.BAND:
        top, kept = trim.band_counts(k, n)
        return [(top + kept if kept else 0, TieRule.EXACT), (top if kept else 0, TieRule.EXACT)]
    if trim.tie_rule is TieRule.DROP_ALL:
        dropped = trim.drop_count(k, n)
        return [
            (n - dropped + 1 if dropped else n, TieRule.DROP_ALL if dropped else TieRule.KEEP_ALL)
        ]
    return [(trim.kept_count(k, n), trim.tie_rule)]


def _pattern(base: Tensor | None, expert: Tensor, dtype: torch.dtype) -> Tensor:
    return magnitude_bits(reference.task_vectors(base, [expert], dtype)[0].flatten())


def _thresholds(
    source: Source, recipe: Recipe, total: int, dtype: torch.dtype
) -> dict[tuple[int, int], tuple[float, int]]:
    """(expert, which) → (threshold, running tie cut)."""
    bits = 64 if dtype == torch.float64 else 32
    found: dict[tuple[int, int], tuple[float, int]] = {}
    searches: dict[tuple[int, int], RadixSelect] = {}
    rules: dict[tuple[int, int], TieRule] = {}
    for k in range(recipe.num_experts):
        if not recipe.trim.active(k) or total == 0:
            found[k, 0] = (0.0, total)
            continue
        for which, (rank, rule) in enumerate(_wanted(recipe, k, total)):
            rules[k, which] = rule
            if rank == 0:
                found[k, which] = _NOTHING
            else:
                searches[k, which] = RadixSelect(rank, bits)
    while any(not s.done for s in searches.values()):
        for base, experts in source():
            for k in sorted({k for k, _ in searches}):
                pattern = _pattern(base, experts[k], dtype)
                for (j, _), search in searches.items():
                    if j == k:
                        search.add(pattern)
        for search in searches.values():
            search.next_digit()
    for key, search in searches.items():
        word = torch.tensor(search.prefix, dtype=torch.int64 if bits == 64 else torch.int32)
        cut = {TieRule.KEEP_ALL: total, TieRule.DROP_ALL: 0}.get(rules[key], -1)
        found[key] = (float(word.view(dtype)), cut)
    exact = {key: searches[key] for key, (_, cut) in found.items() if cut < 0}
    if exact:
        found |= _tie_cuts(source, exact, found, dtype)
    return found


def _tie_cuts(
    source: Source,
    searches: dict[tuple[int, int], RadixSelect],
    found: dict[tuple[int, int], tuple[float, int]],
    dtype: torch.dtype,
) -> dict[tuple[int, int], tuple[float, int]]:
    """Running flat index after the last equal entry that stays (one read)."""
    needed = {key: s.rank for key, s in searches.items()}  # how many equal ones stay
    cuts: dict[tuple[int, int], tuple[float, int]] = {}
    start = 0
    for base, experts in source():
        for key, search in searches.items():
            if key in cuts:
                continue
            equal = (_pattern(base, experts[key[0]], dtype) == search.prefix).nonzero()
            if len(equal) >= needed[key]:
                cuts[key] = (found[key][0], start + int(equal[needed[key] - 1]) + 1)
            needed[key] -= len(equal)
        start += experts[0].numel()
    return cuts


def select_model(source: Source, recipe: Recipe) -> list[Selection]:
    """One selection per tensor from the thresholds of the whole model.

    Args:
        source: called once a pass; yields (base or None, experts) of each tensor in sorted order
            of names.
        recipe: a trim by magnitudes with scope ``model``.
    """
    sizes, dtype = [], torch.float32
    for base, experts in source():
        sizes.append(experts[0].numel())
        if reference.decision_dtype(base, experts) == torch.float64:
            dtype = torch.float64
    bounds = _thresholds(source, recipe, sum(sizes), dtype)
    selections, start = [], 0
    for n in sizes:

        def local(k: int, which: int, start: int = start, n: int = n) -> tuple[float, int]:
            threshold, cut = bounds.get((k, which), _NOTHING)
            return threshold, min(max(cut - start, 0), n)

        own = [(*local(k, 0), *local(k, 1)) for k in range(recipe.num_experts)]
        lows, cuts, tops, top_cuts = zip(*own, strict=True)
        selections.append(Selection(lows, cuts, tops, top_cuts, (1.0,) * recipe.num_experts))
        start += n
    return _second_look(source, recipe, selections, sum(sizes), dtype)


def _second_look(
    source: Source,
    recipe: Recipe,
    selections: list[Selection],
    total: int,
    dtype: torch.dtype,
) -> list[Selection]:
    """Norm factors of each tensor, the sign of all votes of the model, and bounds of all scores,
    where the recipe asks for them."""
    if recipe.weigh is Weigh.SCORE and selections:

        def vectors() -> Iterable[list[Tensor]]:
            for base, experts in source():
                yield reference.task_vectors(base, experts, dtype)

        bounds = pcb.Bounds(selections[0].threshold, selections[0].top_threshold)
        found = pcb.score_bounds(vectors, recipe.trim, bounds, total, dtype)
        selections = [replace(s, score_cut=found.cut, score_top=found.top) for s in selections]
    if recipe.needs_factors:
        selections = [
            replace(s, factor=reference.factors(base, experts, recipe, s))
            for (base, experts), s in zip(source(), selections, strict=True)
        ]
    if recipe.needs_majority:
        votes = sum(
            int(reference.raw_signs(base, experts, recipe, s).to(torch.int64).sum())
            for (base, experts), s in zip(source(), selections, strict=True)
        )
        selections = [replace(s, majority=(votes > 0) - (votes < 0)) for s in selections]
    return selections

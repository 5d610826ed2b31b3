"""Magnitude trim over a whole model at once, as in the original TIES paper: one threshold per expert over all
merged tensors, names sorted, row-major, the flat index running through (METHODS §1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from magic_fast.recipe import Recipe, Selection
from magic_fast.reference import merge as reference
from magic_fast.reference.trim import select_trim

Pair = tuple[Tensor | None, Sequence[Tensor]]


def select_model(tensors: Sequence[Pair], recipe: Recipe) -> list[Selection]:
    """One selection per tensor from the thresholds of the whole model.

    Args:
        tensors: (base or None, experts) of each tensor, in sorted order of their names.
        recipe: a magnitude or band trim with scope ``model``.
    """
    sizes = [experts[0].numel() for _, experts in tensors]
    bounds = []
    for k in range(recipe.num_experts):
        flat = [
            reference.task_vectors(base, [experts[k]], reference.decision_dtype(base, experts))[0].flatten()
            for base, experts in tensors
        ]
        bounds.append(select_trim(torch.cat(flat) if flat else torch.zeros(0), recipe.trim, k))
    selections, start = [], 0
    for n in sizes:
        lows = tuple(b[0] for b in bounds)
        tops = tuple(b[2] for b in bounds)
        cuts = tuple(min(max(b[1] - start, 0), n) for b in bounds)
        top_cuts = tuple(min(max(b[3] - start, 0), n) for b in bounds)
        plain = Selection(lows, cuts, tops, top_cuts, (1.0,) * recipe.num_experts)
        selections.append(replace(plain, factor=reference.factors(*tensors[len(selections)], recipe, plain)))
        start += n
    if recipe.needs_majority:
        votes = sum(
            int(reference.raw_signs(base, experts, recipe, s).to(torch.int64).sum())
            for (base, experts), s in zip(tensors, selections, strict=True)
        )
        majority = (votes > 0) - (votes < 0)
        selections = [replace(s, majority=majority) for s in selections]
    return selections

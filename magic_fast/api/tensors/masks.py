"""Masks that look across experts: ``task_masks``, ``consensus_mask`` and ``emr``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magic_fast.api.tensors.models import Named, labelled, models_of, state_dict_of
from magic_fast.errors import InputError
from magic_fast.ops.checks import check
from magic_fast.ops.job import Job
from magic_fast.recipe import Contributors, Recipe, Reduce, Vote, ZeroVote, per_expert
from magic_fast.reference import merge as reference
from magic_fast.reference import vote


def _row(base: Tensor | None, experts: Sequence[Tensor], name: str) -> list[Tensor]:
    """Checked task vectors of one tensor, in float32 (float64 where any input is)."""
    check(Job(base, experts, Recipe((1.0,) * len(experts)), name=name))
    return reference.task_vectors(base, experts, reference.decision_dtype(base, experts))


def _mean_magnitude(x: Tensor) -> float:
    """mean|x|, summed in float64; 0 for an empty tensor."""
    return float(x.abs().sum(dtype=torch.float64)) / max(x.numel(), 1)


def task_masks(
    base: Any,
    experts: Any,
    merged: Any = None,
    *,
    tall_mask_lambda: float | Sequence[float] = 0.4,
) -> list[Any]:
    """Where each task needs its own weights: |τ_t| > λ_t·|Δ − τ_t|, strictly (TALL masks,
    arXiv 2405.07813).

    Args:
        base: tensor, state dict or module; None where ``experts`` (and ``merged``) are task
            vectors already.
        experts: K of the same kind.
        merged: the merged model of the same kind (its task vector where ``base`` is None). None:
            the base plus the sum of the task vectors.
        tall_mask_lambda: λ, one number or K, each ≥ 0. The larger, the fewer elements.

    Returns:
        K bool tensors of the input's shape, or K state dicts of them. Integer tensors have none.

    Raises:
        InputError: shapes, dtypes or names that do not fit; a negative λ.

    >>> a, b = torch.tensor([3.0, 0.1]), torch.tensor([1.0, 2.0])
    >>> task_masks(None, [a, b])
    [tensor([ True, False]), tensor([False,  True])]
    """
    models = models_of(experts, "experts")
    lambdas = per_expert(tall_mask_lambda, len(models), "tall_mask_lambda")
    for k, lam in enumerate(lambdas):
        if not lam >= 0:
            raise InputError(f"tall_mask_lambda of expert {k}: expected >= 0, got {lam}.")
    rows = labelled(base, models)
    if merged is not None:
        rows.append(("merged", state_dict_of(merged, "merged")))
    table = Named(rows)
    found: list[dict[str, Tensor]] = [{} for _ in models]
    for name, start, row in table.floating(base is not None):
        taus = _row(start, row, name)
        delta = sum(taus[1:], taus[0]) if merged is None else taus.pop()
        for k, mask in enumerate(vote.task_masks(taus, delta, lambdas)):
            found[k][name] = mask
    return [f[""] for f in found] if table.bare else list(found)


def consensus_mask(masks: Any, *, min_tasks: int = 2) -> Any:
    """Where at least ``min_tasks`` of K task masks keep an element.

    Args:
        masks: K bool or uint8 tensors of one shape, or K state dicts of them.
        min_tasks: 1 to K.

    Returns:
        A bool tensor, or a state dict of them.

    Raises:
        InputError: masks that do not fit together; ``min_tasks`` out of range.

    >>> consensus_mask([torch.tensor([True, True]), torch.tensor([False, True])])
    tensor([False,  True])
    """
    models = models_of(masks, "masks")
    table = Named([(f"masks[{k}]", m) for k, m in enumerate(models)])
    if not 1 <= min_tasks <= len(models):
        raise InputError(
            f"min_tasks: expected 1 to {len(models)}, the number of masks, got {min_tasks}."
        )
    found = {}
    for name in table.names:
        row = table.row(name)
        where = f" of '{name}'" if name else ""
        for k, mask in enumerate(row):
            if mask.dtype not in (torch.bool, torch.uint8) or mask.shape != row[0].shape:
                raise InputError(
                    f"masks[{k}]{where}: expected bool or uint8 of shape {tuple(row[0].shape)}, "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}."
                )
        found[name] = vote.consensus(row, min_tasks)
    return found[""] if table.bare else found


@dataclass
class EmrModels:
    """One task vector for all tasks, and what turns it into each task's own (``mf.emr``).

    Attributes:
        unified: τ_u, float32 (float64 for float64 inputs): a tensor or a state dict.
        masks: K bool masks M_k of the same kind.
        rescale: K numbers ρ_k.
    """

    unified: Any
    masks: list[Any]
    rescale: list[float]

    def task_model(self, base: Any, expert: int) -> Any:
        """θ_0 + ρ_k·M_k⊙τ_u in the base's dtypes; tensors that are not floating are the base's.

        Args:
            base: the base given to :func:`emr`.
            expert: k, from 0.
        """
        start = state_dict_of(base, "base")
        mask, ratio = self.masks[expert], self.rescale[expert]

        def one(b: Tensor, unified: Tensor, keep: Tensor) -> Tensor:
            delta = torch.where(keep, unified * ratio, torch.zeros_like(unified))
            return (b.to(unified.dtype) + delta).to(b.dtype)

        if isinstance(start, Tensor):
            return one(start, self.unified, mask)
        return {
            name: one(b, self.unified[name], mask[name]) if name in self.unified else b.clone()
            for name, b in start.items()
        }


def emr(base: Any, experts: Any) -> EmrModels:
    """EMR-Merging (arXiv 2405.17461): elect a unified task vector, mask and rescale it per task.

    σ = + where Σ_k τ_k > 0, else −; τ_u = σ·max over the τ_k of that sign of |τ_k|;
    M_k = [τ_k·σ > 0]; ρ_k = Σ_tensors mean|τ_k| ÷ Σ_tensors mean|M_k⊙τ_u| (0 where nothing is
    masked in).

    Args:
        base: tensor, state dict or module; None where ``experts`` are task vectors already.
        experts: K of the same kind.

    Returns:
        :class:`EmrModels`. ``mf.merge(base, experts, "emr_unified")`` gives the base plus τ_u.

    >>> found = emr(torch.zeros(3), [torch.tensor([2.0, 0, -1]), torch.tensor([1.0, 4, 2])])
    >>> found.unified, [round(r, 3) for r in found.rescale]
    (tensor([2., 4., 2.]), [1.5, 0.875])
    """
    models = models_of(experts, "experts")
    table = Named(labelled(base, models))
    recipe = Recipe(
        (1.0,) * len(models),
        vote=Vote.MASS,
        zero_vote=ZeroVote.NEGATIVE,
        contributors=Contributors.AGREEING,
        reduce=Reduce.MAX,
    )
    unified: dict[str, Tensor] = {}
    masks: list[dict[str, Tensor]] = [{} for _ in models]
    own, kept = [0.0] * len(models), [0.0] * len(models)
    for name, start, row in table.floating(base is not None):
        taus = _row(start, row, name)
        decisions = reference.decide(None, taus, recipe)
        merged = reference.combine(None, taus, recipe, decisions, dtype=taus[0].dtype)
        unified[name] = merged
        for k, mask in enumerate(decisions.contributes or ()):
            assert mask is not None
            masks[k][name] = mask
            own[k] += _mean_magnitude(taus[k])
            kept[k] += _mean_magnitude(torch.where(mask, merged, torch.zeros_like(merged)))
    rescale = [o / m if m else 0.0 for o, m in zip(own, kept, strict=True)]
    if table.bare:
        return EmrModels(unified[""], [m[""] for m in masks], rescale)
    return EmrModels(unified, list(masks), rescale)

"""``svc`` and ``lines``: they scale the spectrum, or the depth, of a model merged by any method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from magic_fast import ops
from magic_fast.api.options import MergeOptions
from magic_fast.api.tensors.models import Named, destination, labelled, models_of, state_dict_of
from magic_fast.calibration.spectrum import SVC_ALPHA, check_lines, check_svc
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe
from magic_fast.reference import spectral
from magic_fast.reference.merge import decision_dtype, task_vectors

#: (name, K task vectors, Δ) → the new Δ, or None where the tensor stays as it is
_Change = Callable[[str, list[Tensor], Tensor], Tensor | None]


def svc(
    base: Any,
    experts: Any,
    merged: Any,
    *,
    alpha: float = SVC_ALPHA,
    out: Any = None,
    nonfinite: str = MergeOptions.nonfinite,
    name: str = "",
) -> Any:
    """The merged model with every singular value of its task vectors divided by how far the experts
    over-agree along it (singular value calibration; formula in
    :func:`magic_fast.reference.spectral.svc`). Matrices only; other tensors are copied.

    Args:
        base: tensor, state dict or module; None where ``experts`` and ``merged`` are task vectors.
        experts: K of the same kind (tensors may be one stacked [K, …] tensor).
        merged: the merged model, of the same names and shapes.
        alpha: least share of an expert that counts, > 0; its authors take 1/K, and 1 after
            ``tsv_m``.
        out: takes the result; default: new, dtype of ``merged``.
        nonfinite: ``"error"`` or ``"propagate"``.
        name: tensor name of a bare tensor, for messages.

    Returns:
        The same kind as ``merged``. Computed in float64 by exact decompositions.

    Raises:
        InputError: names, shapes or parameters that do not fit.
        NonFiniteError: NaN or infinity in an input.

    >>> a = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> svc(None, [a, a], 2 * a)  # the sum counts twice what both say
    tensor([[2., 0.],
            [0., 1.]])
    """
    check_svc(alpha)

    def change(tensor_name: str, taus: list[Tensor], delta: Tensor) -> Tensor | None:
        return spectral.svc(taus, delta, alpha).to(delta.dtype) if delta.dim() == 2 else None

    return _changed(_table(base, experts, merged), base is not None, change, out, nonfinite, name)


def lines(
    base: Any,
    experts: Any,
    merged: Any,
    *,
    beta: float,
    num_blocks: int,
    alpha: float | None = None,
    out: Any = None,
    nonfinite: str = MergeOptions.nonfinite,
    name: str = "",
) -> Any:
    """The merged model with its task vector scaled by depth: alpha + beta·l/(num_blocks − 1) in
    block l, the first l with ".l." in the tensor's name, and alpha outside blocks (LiNeS,
    arXiv 2410.17146).

    Args:
        base, experts, merged: as in :func:`svc`.
        beta: what the last block gets on top of alpha.
        num_blocks: number of blocks, ≥ 1.
        alpha: factor of the first block; None: (‖Σ τ‖₁ / ‖Δ‖₁) / K over the whole model.
        out, nonfinite, name: as in :func:`svc`; a bare tensor finds its block by ``name``.

    Returns:
        The same kind as ``merged``.

    Raises:
        InputError: names, shapes or parameters that do not fit.
        NonFiniteError: NaN or infinity in an input.

    >>> experts = [{"h.0.w": torch.ones(2), "h.1.w": torch.ones(2)}]
    >>> lines(None, experts, experts[0], alpha=0.5, beta=0.5, num_blocks=2)
    {'h.0.w': tensor([0.5000, 0.5000]), 'h.1.w': tensor([1., 1.])}
    """
    check_lines(alpha, beta, num_blocks)
    table, has_base = _table(base, experts, merged), base is not None
    if alpha is None:
        names = [name for name in table.names if table.copied(name) is None]
        alpha = spectral.lines_alpha(_differences(table.row(name), has_base) for name in names)
    first = float(alpha)

    def change(tensor_name: str, taus: list[Tensor], delta: Tensor) -> Tensor | None:
        block = spectral.block_of(tensor_name, num_blocks)
        return delta * spectral.lines_factor(first, beta, block, num_blocks)

    return _changed(table, has_base, change, out, nonfinite, name)


def _table(base: Any, experts: Any, merged: Any) -> Named:
    """Rows (merged, base if any, experts …)."""
    first = ("merged", state_dict_of(merged, "merged"))
    start = None if base is None else state_dict_of(base, "base")
    return Named([first, *labelled(start, models_of(experts, "experts"))])


def _differences(row: list[Tensor], has_base: bool) -> tuple[list[Tensor], Tensor]:
    """(K task vectors, Δ) of a row of the table."""
    base, experts = (row[1], row[2:]) if has_base else (None, row[1:])
    *taus, delta = task_vectors(base, [*experts, row[0]], decision_dtype(base, row))
    return taus, delta


def _changed(
    table: Named, has_base: bool, change: _Change, out: Any, nonfinite: str, name: str
) -> Any:
    results: dict[str, Tensor] = {}
    for tensor_name in table.names:
        row = table.row(tensor_name)
        target = destination(out, tensor_name, table.bare, "merged")
        target = torch.empty_like(row[0]) if target is None else target
        results[tensor_name] = target
        if table.copied(tensor_name) is not None:
            target.copy_(row[0])
            continue
        label = tensor_name or name
        start, own = (row[1], row[2:]) if has_base else (None, row[1:])
        # the merged model stands among the experts, so that it passes the same checks
        job = Job(start, [*own, row[0]], Recipe((1.0,) * (len(own) + 1)), target, label)

        def whole(job: Job) -> Tensor:
            *taus, delta = task_vectors(
                job.base, job.experts, decision_dtype(job.base, job.experts)
            )
            changed = change(job.name, taus, delta)
            if changed is None:
                kept: Tensor = job.experts[-1].to(delta.dtype)
                return kept
            return changed if job.base is None else job.base.to(changed.dtype) + changed

        ops.run_function([job], whole, nonfinite=nonfinite)
    return results[""] if table.bare else results

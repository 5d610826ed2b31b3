"""Sums of low-rank matrices by their factors: no m×n matrix is formed, or decomposed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magic_fast.errors import InputError, NonFiniteError

Factors = tuple[Tensor, Tensor]


def stack_factors(
    ups: Sequence[Tensor], downs: Sequence[Tensor], weights: Sequence[float]
) -> Factors:
    """(up [m, R], down [R, n]) with up @ down = Σ_k w_k·B_k·A_k, exactly: [w_1·B_1 …], [A_1; …].

    Args:
        ups: K matrices B_k [m, r_k]; ranks may differ.
        downs: K matrices A_k [r_k, n].
        weights: K numbers; the scaling of an adapter is part of its weight.

    Returns:
        In the dtype that all factors promote to, at least float32; R = Σ r_k.

    Raises:
        InputError: the factors do not fit together.

    >>> up, down = stack_factors([torch.ones(2, 1)] * 2, [torch.ones(1, 3)] * 2, [0.5, 2.0])
    >>> up
    tensor([[0.5000, 2.0000],
            [0.5000, 2.0000]])
    """
    if not ups or not len(ups) == len(downs) == len(weights):
        raise InputError(
            "factors: expected as many ups as downs and weights, at least one, got "
            f"{len(ups)}, {len(downs)} and {len(weights)}."
        )
    dtype = torch.float32
    for k, (up, down) in enumerate(zip(ups, downs, strict=True)):
        fits = up.dim() == down.dim() == 2 and up.shape[1] == down.shape[0]
        if not fits or up.shape[0] != ups[0].shape[0] or down.shape[1] != downs[0].shape[1]:
            raise InputError(
                f"factors {k}: expected [{ups[0].shape[0]}, r] and [r, {downs[0].shape[-1]}], got "
                f"{list(up.shape)} and {list(down.shape)}."
            )
        dtype = torch.promote_types(dtype, torch.promote_types(up.dtype, down.dtype))
    up = torch.cat([b.to(dtype) * w for b, w in zip(ups, weights, strict=True)], dim=1)
    return up, torch.cat([a.to(dtype) for a in downs])


def low_rank_svd(
    up: Tensor, down: Tensor, rank: int | None = None, *, label: str = "a matrix"
) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, r], σ [r] descending, V [n, r]) of the product up @ down, which is never formed:
    up = Q_B·R_B, downᵀ = Q_A·R_A, and the singular triples of the small core R_B·R_Aᵀ.

    Costs O((m + n)·R²) for factors of rank R, where a decomposition of the product costs
    O(m·n·min(m, n)).

    Args:
        up: [m, R]. down: [R, n].
        rank: number of triples; None: R. Beyond min(m, n, R) they are zero.
        label: what to call the product in a message.

    Returns:
        dtype of ``up``, at least float32; computed in float64. U·diag(σ)·Vᵀ is the nearest matrix
        of that rank.

    Raises:
        NonFiniteError: NaN or infinity in a factor.

    >>> u, s, v = low_rank_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0]]))
    >>> s
    tensor([5.])
    """
    for factor, what in ((up, "up"), (down, "down")):
        if not bool(torch.isfinite(factor).all()):
            raise NonFiniteError(
                f"factor '{what}' of {label}: expected finite values, got NaN or infinity."
            )
    dtype = torch.promote_types(torch.float32, up.dtype)
    rank = up.shape[1] if rank is None else rank
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    kept = min(rank, s.numel())

    def finished(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, rank - kept)).to(dtype)

    return finished(q_up @ u[:, :kept]), finished(s[:kept]), finished(q_down @ vh[:kept].T)


def combine_low_rank(
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    weights: Sequence[float],
    rank: int | None = None,
    *,
    label: str = "a matrix",
) -> Factors:
    """(up [m, r], down [r, n]) of Σ_k w_k·B_k·A_k: exact without ``rank``, else the nearest matrix
    of that rank, with up = U·diag(σ) and orthonormal rows of ``down``
    (:func:`stack_factors`, :func:`low_rank_svd`).

    >>> up, down = combine_low_rank(
    ...     [torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]], [torch.eye(3)[:1], torch.eye(3)[1:2]],
    ...     [1.0, 2.0], rank=1)
    >>> (up @ down).diagonal()
    tensor([0., 2., 0.])
    """
    up, down = stack_factors(ups, downs, weights)
    if rank is None:
        return up, down
    u, s, v = low_rank_svd(up, down, rank, label=label)
    return u * s, v.T.contiguous()

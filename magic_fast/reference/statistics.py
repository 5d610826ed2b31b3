"""Merges by what samples tell of each weight, in plain PyTorch (docs/methods_data.md).

RegMean (Jin et al., arXiv 2212.09849): the weight whose outputs are nearest to the experts' on
their own inputs. Fisher merging (Matena and Raffel, arXiv 2111.09832): the mean weighted by how
much each weight matters to its expert's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DAMPING = 1e-10  # of the largest diagonal element: a direction without inputs keeps the mean


def with_smaller_off_diagonal(gram: Tensor, factor: float) -> Tensor:
    """α·G off the diagonal, G on it.

    >>> with_smaller_off_diagonal(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 0.5)
    tensor([[2.0000, 0.5000],
            [0.5000, 2.0000]])
    """
    found = gram * factor
    found.diagonal().copy_(gram.diagonal())
    return found


def nearest(mean: Tensor, gram: Tensor, residual: Tensor) -> Tensor:
    """mean + (G⁻¹·R)ᵀ: of all matrices [out, in] the one whose outputs are nearest to the experts'.

    Args:
        mean: [out, in], what it is where no input tells.
        gram: Σ_k G_k, [in, in].
        residual: R = Σ_k G_k·(W_k − mean)ᵀ, [in, out].

    >>> w = torch.tensor([[1.0]]), torch.tensor([[4.0]])
    >>> g = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    >>> residual = sum(a @ (b - 2.0).T for a, b in zip(g, w))
    >>> nearest(torch.tensor([[2.0]]), g[0] + g[1], residual)
    tensor([[3.]])
    """
    wide = gram.double()
    largest = wide.diagonal().max()
    if not bool(largest > 0):
        return mean.clone()
    wide = wide + torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * largest * _DAMPING
    factor, info = torch.linalg.cholesky_ex(wide)
    if int(info):  # rounding made it indefinite
        solved = torch.linalg.lstsq(wide, residual.double()).solution
    else:
        solved = torch.cholesky_solve(residual.double(), factor)
    found: Tensor = (mean.double() + solved.T).to(mean.dtype)
    return found


def weighted_mean(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ_k F_k·θ_k ÷ Σ_k F_k, element by element; where all F are 0 the mean.

    >>> weighted_mean([torch.tensor([1.0, 1]), torch.tensor([3.0, 3])],
    ...               [torch.tensor([1.0, 0]), torch.tensor([3.0, 0])])
    tensor([2.5000, 2.0000])
    """
    total = torch.stack([w.double() for w in weights]).sum(0)
    top = sum((w.double() * v.double() for v, w in zip(values, weights, strict=True)), start=0.0)
    plain = torch.stack([v.double() for v in values]).mean(0)
    found: Tensor = torch.where(total > 0, top / total, plain).to(values[0].dtype)
    return found


def sampled_classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One class drawn from each distribution, int64 [..., ]."""
    chances = torch.softmax(logits.detach().double(), -1).cpu()
    flat = chances.reshape(-1, chances.shape[-1])
    drawn = torch.multinomial(flat, 1, generator=generator)
    return drawn.view(logits.shape[:-1]).to(logits.device)

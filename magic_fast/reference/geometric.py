"""Means of directions: the coefficients that SLERP, NuSLERP, MultiSLERP, the Karcher mean and Model
Stock give to K vectors, from their Gram matrix alone (docs/methods.md).

Every function takes float64 inner products and returns float64 coefficients; the vectors
themselves are read by :class:`magic_fast.reference.gram.Vectors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from magic_fast.errors import InputError

_NEARLY_PARALLEL = 0.9995  # above it slerp is plain interpolation (mergekit, FusionBench)
_NOT_NORMALISED = 1e-8  # a vector this short keeps its length, so its cosine is about 0
_TINY_SINE = 1e-6  # the MAGIC authors' bound
_SHORT = 1e-7  # NuSLERP: a shorter vector counts as this long
_FLAT = 1e-12  # NuSLERP: below this sin² the interpolation is plain
_NO_WEIGHT = 1e-6  # NuSLERP: weights whose sum is smaller count half each
_NO_DIRECTION = 1e-6  # MultiSLERP: a mean direction this short is none
_SMALL_PRODUCT = 1e-6  # Model Stock under preset mergekit: least product of two norms
_RELATIVE_PRODUCT = 1e-12  # Model Stock: the same, against the longest vector squared


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def slerp(gram: Tensor, t: float) -> Tensor:
    """[sin((1−t)ω), sin(tω)] / sin ω with ω the angle between two vectors; [1 − t, t] where
    |cos ω| > 0.9995.

    Args:
        gram: float64 [..., 2, 2], inner products of whole weights or of task vectors.
        t: 0 gives the first, 1 the second.

    Returns:
        float64 [..., 2].

    >>> slerp(torch.eye(2, dtype=torch.float64), 0.5)
    tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    norm_a, norm_b = _norms(gram).unbind(-1)
    one = torch.ones_like(norm_a)
    length = torch.where(norm_a > _NOT_NORMALISED, norm_a, one) * torch.where(
        norm_b > _NOT_NORMALISED, norm_b, one
    )
    cosine = (gram[..., 0, 1] / length).clamp(-1, 1)
    omega = torch.acos(cosine)
    straight = cosine.abs() > _NEARLY_PARALLEL
    safe = torch.where(straight, one, torch.sin(omega))
    shares = [
        torch.where(straight, share * one, torch.sin(share * omega) / safe) for share in (1 - t, t)
    ]
    return torch.stack(shares, dim=-1)


def slerp_magic(gram: Tensor) -> Tensor:
    """The MAGIC authors' rule, t = ½: plain mean where |sin ω| < 1e-6; a zero vector gives NaN."""
    norm_a, norm_b = _norms(gram).unbind(-1)
    omega = torch.acos((gram[..., 0, 1] / (norm_a * norm_b)).clamp(-1, 1))
    sine = torch.sin(omega)
    share = torch.where(
        sine.abs() < _TINY_SINE, 0.5 * torch.ones_like(sine), torch.sin(omega / 2) / sine
    )
    return torch.stack([share, share], dim=-1)


def nuslerp(gram: Tensor, weights: Sequence[float]) -> Tensor:
    """[sin((1−t)ω), sin(tω)] ÷ sin ω with t = w₁/(w₀+w₁) and ω the angle between the two vectors.

    Args:
        gram: float64 [..., 2, 2].
        weights: two numbers; t = ½ where their sum is below 1e-6 in magnitude.

    Returns:
        float64 [..., 2]; (1−t, t) where sin²ω < 1e-12. Norms count as 1e-7 at least, so a zero
        vector is orthogonal to all.

    >>> nuslerp(torch.eye(2, dtype=torch.float64), (1.0, 1.0))
    tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    total = weights[0] + weights[1]
    t = 0.5 if abs(total) < _NO_WEIGHT else weights[1] / total
    norms = _norms(gram).clamp(min=_SHORT)
    cosine = (gram[..., 0, 1] / (norms[..., 0] * norms[..., 1])).clamp(-1, 1)
    straight = 1 - cosine.square() < _FLAT
    omega = torch.acos(cosine)
    sine = torch.where(straight, torch.ones_like(omega), torch.sin(omega))
    share = [(1 - t), t]
    return torch.stack(
        [torch.where(straight, torch.full_like(omega, s), torch.sin(s * omega) / sine)
         for s in share], dim=-1,
    )  # fmt: skip


def multislerp(
    gram: Tensor, weights: Sequence[float], *, normalize: bool = True, eps: float = 1e-8,
    name: str = "",
) -> Tensor:  # fmt: skip
    """Mean of K directions in the tangent space at their normalised sum, times the mean length.

    With n_k = ‖x_k‖, D_k = n_k + eps, C the inner products of x_k/D_k and w the weights::

        μ = √(wᵀCw)   m = w/μ   y = w − (Σ w_k (Cm)_k)·m   τ = √(yᵀCy) + eps
        c_k = (cos τ·m_k + (sin τ/τ)·y_k) · (Σ_j w_j n_j) / D_k

    Args:
        gram: float64 [K, K].
        weights: K numbers, ÷ their sum where ``normalize``.
        eps: keeps lengths and angles from zero.
        name: tensor name for messages.

    Returns:
        float64 [K]. K = 1: 1. All vectors zero: 0.

    Raises:
        InputError: weights that sum to zero; more than two vectors that cancel (μ < 1e-6). Two
            that cancel give their plain weighted sum.
    """
    k = len(weights)
    w = torch.tensor(weights, dtype=torch.float64)
    if k == 1:
        return torch.ones(1, dtype=torch.float64)
    where = f" for '{name}'" if name else ""
    if normalize:
        total = float(w.sum())
        if total == 0:
            raise InputError(
                f"weights{where}: expected a sum other than 0, got {list(weights)}. Change them, "
                "or set normalize_weights to false."
            )
        w = w / total
    norms = _norms(gram)
    if not bool((norms > 0).any()):
        return torch.zeros(k, dtype=torch.float64)
    lengths = norms + eps
    cosines = gram / torch.outer(lengths, lengths)
    size = math.sqrt(max(float(w @ cosines @ w), 0.0))
    if size < max(eps, _NO_DIRECTION):
        if k == 2:
            return w
        raise InputError(
            f"vectors{where}: expected a mean direction, got {k} whose weighted directions cancel "
            f"(length {size:.1e}). Change the weights, or use another method for this tensor."
        )
    mean = w / size
    y = w - float(w @ cosines @ mean) * mean
    angle = math.sqrt(max(float(y @ cosines @ y), 0.0)) + eps
    direction = math.cos(angle) * mean + math.sin(angle) / angle * y
    return direction * float(w @ norms) / lengths


def karcher(gram: Tensor, *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The Riemannian (Karcher) mean of K directions on the sphere, equal weights, times the mean
    length.

    Directions of vectors longer than ``tol`` take part; the lengths of all do. Starting at the
    normalised mean x (the first direction where that is shorter than ``tol``), repeat: with
    θ_k = arccos⟨x, x̂_k⟩, step along N·ŷ = (1/M)Σ_k (θ_k/sin θ_k)(x̂_k − cos θ_k·x) on the great
    circle, until N ≤ ``tol``.

    Args:
        gram: float64 [K, K].
        max_iter: steps at most.
        tol: shortest vector, angle and step that count.

    Returns:
        float64 [K]. K = 1: 1. No vector longer than ``tol``: 0.
    """
    k = gram.shape[-1]
    if k == 1:
        return torch.ones(1, dtype=torch.float64)
    norms = _norms(gram)
    valid = norms > tol
    found = torch.zeros(k, dtype=torch.float64)
    count = int(valid.sum())
    if count == 0:
        return found
    cosines = gram[valid][:, valid] / torch.outer(norms[valid], norms[valid])
    x = torch.full((count,), 1.0 / count, dtype=torch.float64)
    size = _length(x, cosines)
    if size <= tol:
        x = torch.zeros_like(x)
        x[0] = 1.0
    else:
        x = x / size
    for _ in range(max_iter):
        cosine = (cosines @ x).clamp(-1, 1)
        theta = torch.arccos(cosine)
        g = torch.where(theta <= tol, torch.zeros_like(theta), theta / torch.sin(theta)) / count
        y = g - float(g @ cosine) * x
        step = _length(y, cosines)
        if step <= tol:
            break
        x = math.cos(step) * x + math.sin(step) / step * y
        x = x / _length(x, cosines)
    found[valid] = x / norms[valid] * float(norms.sum()) / k
    return found


def _length(x: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(float(x @ cosines @ x), 0.0))


def model_stock(gram: Tensor, *, absolute: bool = False) -> Tensor:
    """t/K for each of K task vectors, t = K·c̄/(1+(K−1)·c̄) with c̄ their mean pairwise cosine
    (Model Stock, arXiv 2403.19522).

    Args:
        gram: float64 [..., K, K] of the task vectors, K ≥ 2.
        absolute: the product of two norms counts as 1e-6 at least (mergekit); else as 1e-12 of
            the longest vector squared, which does not change with the scale of the task vectors.

    Returns:
        float64 [..., K]; 0 where |1+(K−1)·c̄| < 1e-6. t is not clamped.
    """
    k = gram.shape[-1]
    norms = _norms(gram)
    products = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    if absolute:
        products = products.clamp(min=_SMALL_PRODUCT)
    else:
        least = norms.amax(-1).square() * _RELATIVE_PRODUCT
        products = torch.maximum(products, least[..., None, None])
        products = torch.where(products == 0, torch.ones_like(products), products)
    cosines = (gram / products).clamp(-1, 1)
    pairs = cosines.triu(1).sum((-2, -1)) / (k * (k - 1) / 2)
    divisor = 1 + (k - 1) * pairs
    none = divisor.abs() < 1e-6
    t = torch.where(none, torch.zeros_like(pairs), k * pairs / torch.where(none, 1.0, divisor))
    return (t / k).unsqueeze(-1).expand(*t.shape, k)

"""``add_weighted_adapter("svd")`` by the factors: QR of both stacks and the SVD of a small core,
where PEFT forms Σ w·s·B·A and decomposes it whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.model import LoraModel
from torch import Tensor

from magic_fast.errors import NonFiniteError
from magic_fast.spectral import combine_low_rank

Method = Callable[..., tuple[Tensor, Tensor]]

NAME = "_svd_generalized_task_arithmetic_weighted_adapter"
#: PEFT's method, as it was when this file was first imported; None where a release has none.
OWN: Method | None = vars(LoraModel).get(NAME)

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def put(method: Method) -> None:
    """As PEFT's method from now on."""
    setattr(LoraModel, NAME, method)


def factors_of(target: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """(B [m, r], A [r, n]) of one layer, so that what PEFT decomposes is scaling·B·A; None for
    layers that make their weight in another way (quantised ones may, attentions do)."""
    delta = getattr(type(target), "get_delta_weight", None)
    if adapter in target.lora_embedding_A:
        if delta is not lora.Embedding.get_delta_weight:
            return None
        return target.lora_embedding_B[adapter].detach(), target.lora_embedding_A[adapter].detach()
    up, down = target.lora_B[adapter].weight.detach(), target.lora_A[adapter].weight.detach()
    if delta is lora.Linear.get_delta_weight:
        return up, down
    is_conv = isinstance(target, lora.Conv2d) and delta is lora.Conv2d.get_delta_weight
    if is_conv and target.get_base_layer().groups == 1:
        return up.flatten(1), down.flatten(1)
    return None


def _takes(factors: Sequence[tuple[Tensor, Tensor]]) -> bool:
    like = factors[0][0]
    return like.device.type in ("cpu", "cuda") and all(
        x.dtype in _FLOATS and x.device == like.device for pair in factors for x in pair
    )


def completed(down: Tensor, known: int) -> Tensor:
    """``down`` [r, n], whose rows from ``known`` on are zero, with orthonormal rows throughout: an
    adapter with rows of zeros on both sides would never learn there."""
    rows, wide = down[:known].double(), down.shape[1]
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(wide, down.shape[0] - known, generator=generator, dtype=torch.float64)
    more = more.to(down.device)
    for _ in range(2):  # once leaves what rounding left
        more = torch.linalg.qr(more - rows.T @ (rows @ more))[0]
    return torch.cat([rows, more.T]).to(down.dtype)


def by_factors(
    adapters: Sequence[str], weights: Sequence[float], rank: int, target: Any, power: int
) -> tuple[Tensor, Tensor] | None:
    """(A [r, n], B [m, r]) of the best rank-r approximation of Σ w·s^power·B·A; None: to be left
    to PEFT's own."""
    own = [
        (adapter, weight)
        for adapter, weight in zip(adapters, weights, strict=False)
        if adapter in target.lora_A or adapter in target.lora_embedding_A
    ]
    found = [factors_of(target, adapter) for adapter, _ in own]
    pairs = [pair for pair in found if pair is not None]
    if not pairs or len(pairs) < len(found) or not _takes(pairs):
        return None
    (m, _), (_, n) = pairs[0][0].shape, pairs[0][1].shape
    if rank > min(m, n):
        return None
    scaled = [weight * target.scaling[adapter] ** power for adapter, weight in own]
    ups, downs = [up for up, _ in pairs], [down for _, down in pairs]
    try:
        up, down = combine_low_rank(ups, downs, scaled, rank, label=type(target).__name__)
    except NonFiniteError:
        return None
    known = min(rank, m, n, sum(x.shape[0] for x in downs))
    if known < rank:
        down = completed(down, known)
    dtype = torch.tensor([weight for _, weight in own]).dtype
    for x in ups:
        dtype = torch.promote_types(dtype, x.dtype)
    return down.to(dtype), up.to(dtype)


def replacement(power: int) -> Method:
    """PEFT's method with the low-rank route.

    Args:
        power: how often its release applies an adapter's scaling (0.20 twice, 0.21.2 once).
    """
    own = OWN
    assert own is not None

    @functools.wraps(own)
    def weighted(
        self: Any,
        combination_type: str,
        adapters: Sequence[str],
        weights: Sequence[float],
        new_rank: int,
        target: Any,
        target_lora_A: Tensor,
        target_lora_B: Tensor,
        density: float | None,
        majority_sign_method: str,
        clamp: float | None = None,
        full_matrices: bool = True,
        driver: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        # The quantile that clamps depends on the signs of the singular vectors, which are LAPACK's
        # choice; a driver that is asked for is used.
        if combination_type == "svd" and clamp is None and driver is None:
            found = by_factors(adapters, weights, new_rank, target, power)
            if found is not None:
                down, up = found
                return down.reshape(target_lora_A.shape), up.reshape(target_lora_B.shape)
        least = min(target_lora_A[0].numel(), target_lora_B.shape[0])
        if full_matrices and clamp is None and new_rank <= least:
            full_matrices = False  # the leading vectors are the same but for LAPACK's last bit
        return own(
            self, combination_type, adapters, weights, new_rank, target, target_lora_A,
            target_lora_B, density, majority_sign_method, clamp, full_matrices=full_matrices,
            driver=driver,
        )  # fmt: skip

    return weighted

"""Means of directions on the native backend against float64: coefficients from inner products that
are summed in another way, the same values. (The other backends leave them to PyTorch.)"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.errors import NonFiniteError
from support.backends import available_backends
from support.oracle import ulp

pytestmark = pytest.mark.skipif(
    "native" not in available_backends(), reason="needs the native backend"
)
METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "slerp": ("slerp", 1, {"t": 0.3}),
    "slerp_per_row": ("slerp", 1, {"t": 0.3, "per_row": True}),
    "slerp_of_two": ("slerp", 2, {"t": 0.6}),
    "slerp_magic": ("slerp", 2, {"t": 0.5, "preset": "magic"}),
    "nuslerp": ("nuslerp", 2, {"weights": [0.7, 0.5]}),
    "nuslerp_rows": ("nuslerp", 2, {"nuslerp_flatten": False}),
    "multislerp": ("multislerp", 3, {"weights": [0.5, 0.2, 0.4]}),
    "multislerp_9": ("multislerp", 9, {"normalize_weights": False}),
    "karcher": ("karcher", 3, {}),
    "model_stock": ("model_stock", 3, {}),
    "model_stock_filters": ("model_stock", 4, {"filter_wise": True}),
}
#: elements of a row: less than a block of 16, less than a tile, a tail of each; more than 65536
SHAPES = [(7, 33), (65,), (6, 3, 3, 3), (300, 5), (9, 2049), (2, 70_001), (1, 1), ()]
B, H, F = torch.bfloat16, torch.float16, torch.float32
MIXES = {"bf16": (B,), "f16": (H,), "f32": (F,), "mixed": (F, B, H)}


def models(shape: tuple[int, ...], k: int, mix: str) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=g)
    common = 0.2 * torch.randn(shape, generator=g)
    experts = [base + common + 0.2 * torch.randn(shape, generator=g) for _ in range(k)]
    dtypes = MIXES[mix]
    return base.to(dtypes[0]), [e.to(dtypes[n % len(dtypes)]) for n, e in enumerate(experts)]


def merge(
    case: str, base: Tensor | None, experts: list[Tensor], backend: str, out: Tensor, **more: Any
) -> Tensor:
    method, _, settings = METHODS[case]
    options = {"backend": backend, "out": out, "name": "w", **settings, **more}
    merged: Tensor = (
        mf.merge_task_vectors(experts, method, **options)
        if base is None
        else mf.merge(base, experts, method, **options)
    )
    return merged


def assert_parity(case: str, base: Tensor | None, experts: list[Tensor], **more: Any) -> None:
    """Within plain float32's largest error, and one unit in the last place of the output."""
    like = experts[0] if base is None else base
    got = merge(case, base, experts, "native", torch.empty_like(like), **more)

    def in_torch(dtype: torch.dtype) -> Tensor:
        start = None if base is None else base.to(dtype)
        out = torch.empty(like.shape, dtype=dtype)
        return merge(case, start, [e.to(dtype) for e in experts], "torch", out, **more).double()

    truth = in_torch(torch.float64)
    budget = float((in_torch(torch.float32) - truth).abs().max()) if truth.numel() else 0.0
    wrong = ~((got.double() - truth).abs() <= budget + ulp(truth, got.dtype))
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} beyond {budget:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", METHODS)
def test_directions(case: str, shape: tuple[int, ...]) -> None:
    for mix in MIXES if math.prod(shape) < 10_000 else ("mixed",):
        _one_mix(case, shape, mix)


def _one_mix(case: str, shape: tuple[int, ...], mix: str) -> None:
    base, experts = models(shape, METHODS[case][1], mix)
    assert_parity(case, base, experts)
    if METHODS[case][1] > 1:
        assert_parity(case, None, experts)


CALIBRATIONS = {
    "wsc": "wsc",
    "tensor": {"granularity": "tensor"},
    "sphere": {"variant": "sphere", "p": 1},
    "exact": {"variant": "manifold_exact"},
}


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("shape", [(7, 33), (6, 3, 3, 3), (9, 2049)], ids=str)
@pytest.mark.parametrize("case", METHODS)
def test_calibrated(case: str, shape: tuple[int, ...], calibration: str) -> None:
    settings = CALIBRATIONS[calibration]
    for mix in ("bf16", "mixed"):
        base, experts = models(shape, METHODS[case][1], mix)
        assert_parity(case, base, experts, calibrate=settings)


@pytest.mark.parametrize("case", METHODS)
def test_squares_that_float32_does_not_hold(case: str) -> None:
    """Their sum overflows; the elements and the result do not."""
    base, experts = models((7, 33), METHODS[case][1], "f32")
    assert_parity(case, base * 1e25, [e * 1e25 for e in experts])
    assert_parity(case, base * 1e-12, [e * 1e-12 for e in experts])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("case", METHODS)
def test_what_is_not_finite_is_named(case: str, bad: float) -> None:
    for where in ("the base", "expert 0"):
        base, experts = models((7, 33), METHODS[case][1], "bf16")
        (base if where == "the base" else experts[0]).view(-1)[40] = bad
        with pytest.raises(NonFiniteError) as caught:
            merge(case, base, experts, "native", torch.empty_like(base))
        assert str(caught.value).startswith(f"NaN or infinity in {where} for 'w': ")
        assert "at flat index 40." in str(caught.value)

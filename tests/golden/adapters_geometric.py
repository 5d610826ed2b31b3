"""mergekit's methods between directions and between pairs of models, under the preset of that
name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import magic_fast as mf
from golden.adapters import adapter, target
from golden.golden_case import GoldenCase

_DIRECTIONS = ("nuslerp", "multislerp", "karcher", "model_stock")
_ELEMENTS = ("nearswap", "sce", "ram", "ramplus_tl")


@adapter(*(f"mergekit.{method}" for method in (*_DIRECTIONS, *_ELEMENTS)))
def any_backend(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    return _merged(case, backend, wide)


@adapter("mergekit.arcee_fusion", torch_only=True)
def whole_tensor(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    return _merged(case, None, wide)


def _merged(case: GoldenCase, backend: str | None, wide: bool) -> dict[str, Tensor]:
    method, experts = case.op.removeprefix("mergekit."), list(case.inputs["experts"])
    params: dict[str, Any] = {**case.params["params"], **case.params.get("tensor_params", {})}
    if "weight" in case.params:
        params["weight"] = case.params["weight"]
    params.pop("int8_mask", None)  # no effect on values
    merged = mf.merge(
        case.inputs.get("base"), experts, method, preset="mergekit", backend=backend,
        out=target(experts[0], wide), **params,
    )  # fmt: skip
    if method == "sce" and case.outputs["merged"].dim() > merged.dim():
        # k = 0: the reference returns its zero mask's shape, [1, …]; the values are the base's
        merged = merged[None]
    return {"merged": merged}

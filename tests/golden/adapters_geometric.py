"""mergekit's methods between directions and between pairs of models, under the preset of that
name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import magic_fast as mf
from golden.adapters import adapter, target
from golden.golden_case import GoldenCase

_METHODS = (
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "nearswap",
    "arcee_fusion",
    "sce",
    "ram",
    "ramplus_tl",
)


@adapter(*(f"mergekit.{method}" for method in _METHODS), torch_only=True)
def whole_tensor(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    method, experts = case.op.removeprefix("mergekit."), list(case.inputs["experts"])
    params: dict[str, Any] = {**case.params["params"], **case.params.get("tensor_params", {})}
    if "weight" in case.params:
        params["weight"] = case.params["weight"]
    params.pop("int8_mask", None)  # no effect on values
    merged = mf.merge(
        case.inputs.get("base"), experts, method, preset="mergekit", out=target(experts[0], wide),
        **params,
    )  # fmt: skip
    if method == "sce" and case.outputs["merged"].dim() > merged.dim():
        # k = 0: the reference returns its zero mask's shape, [1, …]; the values are the base's
        merged = merged[None]
    return {"merged": merged}

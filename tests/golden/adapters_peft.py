"""PEFT's functions on stacked task tensors, under the preset of that name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import magic_fast as mf
from golden.adapters import NotYet, adapter, target
from golden.golden_case import GoldenCase
from magic_fast.methods.registry import built_in

_METHODS = ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")


@adapter(*(f"peft.{method}" for method in _METHODS))
def merge(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    method, params = case.op.removeprefix("peft."), case.params
    if method not in built_in():
        raise NotYet(f"method {method}")
    experts = list(case.inputs["experts"])
    dtype = getattr(torch, params.get("weights_dtype", "float32"))
    weights = torch.tensor(params["weights"], dtype=dtype)
    options: dict[str, Any] = {
        name: params[name] for name in ("density", "majority_sign_method") if name in params
    }
    if "mask0" in case.outputs:
        options["masks"] = case.masks(len(experts))
    merged = mf.merge_task_vectors(
        experts, method, preset="peft", weights=weights, backend=backend,
        out=target(experts[0], True) if wide else None, **options,
    )  # fmt: skip
    if not wide:
        assert merged.dtype == case.outputs["merged"].dtype  # promote(tensor, weights)
    outputs = {"merged": merged}
    if "masks" in options:
        found = mf.merge_task_vectors(
            experts, method, preset="peft", weights=weights, details=True, **options
        )
        outputs.update({f"mask{k}": m for k, m in enumerate(found.keep_masks)})
    return outputs

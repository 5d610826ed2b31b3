"""PEFT's merges of whole adapters, answered by merging the adapters' files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import magic_fast as mf
from adapters.adapter_files import Lora, is_embedding, write_peft
from golden.adapters import adapter
from golden.golden_case import GoldenCase

_METHODS = {"linear": "task_arithmetic", "cat": "task_arithmetic", "svd": "task_arithmetic"}


@adapter("peft.add_weighted_adapter")
def merge(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    """Factors as merged, and ``delta`` by the scaling that the recorded adapter has (an inherited
    use_rslora leaves √r there; ours has it in the factors)."""
    params = case.params
    kind, weights = params["combination_type"], list(params["weights"])
    by_svd = kind.endswith("svd") and len(weights) > 1
    loras = [_lora(case, k) for k in range(len(weights))]
    options: dict[str, Any] = {
        name: params[name] for name in ("density", "majority_sign_method") if name in params
    }
    if by_svd:
        # that release applied an adapter's scaling twice
        weights = [w * lora.scaling("fc1") for w, lora in zip(weights, loras, strict=True)]
        options["rank"] = params.get("svd_rank") or max(a["r"] for a in params["adapters"])
    elif kind != "cat":
        options["on"] = "factors"
    if "mask0" in case.outputs:
        options["masks"] = _masks(case, len(weights))
    method = "task_arithmetic" if kind == "svd" else kind.removesuffix("_svd")
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_peft(Path(folder, str(k)), lora) for k, lora in enumerate(loras)]
        mf.merge_adapters(
            paths, Path(folder, "out"), _METHODS.get(method, method), weights=weights,
            preset="peft", backend=backend, **options,
        )  # fmt: skip
        found = load_file(Path(folder, "out", "adapter_model.safetensors"))
    outputs = dict(case.outputs) if "mask0" in case.outputs else {}  # masks were given
    for module in params["target_modules"]:
        a, b = _pair(found, module)
        scaling = case.record["meta"]["scaling_out"][module]
        delta = scaling * b @ a
        outputs |= {
            f"{module}.lora_A": a,
            f"{module}.lora_B": b,
            f"{module}.delta": delta.T if is_embedding(module) else delta,
        }
    return outputs


def _lora(case: GoldenCase, k: int) -> Lora:
    state = case.model(f"adapter{k}")
    factors = {
        module: (state[f"{module}.lora_A"], state[f"{module}.lora_B"])
        for module in case.params["target_modules"]
    }
    return Lora(factors, dict(case.params["adapters"][k]))


def _pair(state: dict[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    stem = f"base_model.model.{module}"
    if is_embedding(module):
        return state[f"{stem}.lora_embedding_A"], state[f"{stem}.lora_embedding_B"]
    return state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"]


def _masks(case: GoldenCase, num_adapters: int) -> list[dict[str, Tensor]]:
    """Drawn module by module, A of all adapters and then B."""
    masks: list[dict[str, Tensor]] = [{} for _ in range(num_adapters)]
    number = 0
    for module in case.params["target_modules"]:
        for factor in ("lora_A", "lora_B"):
            for mask in masks:
                key = f"base_model.model.{module}.{factor}.weight"
                mask[key] = case.outputs[f"mask{number}"].to(torch.bool)
                number += 1
    return masks

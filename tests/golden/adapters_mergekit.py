"""mergekit's methods on one tensor, under the preset of that name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import magic_fast as mf
from golden.adapters import adapter, target, upcast
from golden.golden_case import GoldenCase

_ELEMENTWISE = (
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "linear",
)
_RULES = {
    "magnitude": "magnitude",
    "magnitude_outliers": "band",
    "random": "random",
    "della_magprune": "ranked",
}


def _compat(case: GoldenCase) -> str | None:
    """``*_ntop0`` records a fault of release 0.1.4 (δ = 0 where ⌊γ·n⌋ = 0), matched on request."""
    return "mergekit-0.1.4" if case.id.endswith("_ntop0") else None


def _parameters(case: GoldenCase) -> dict[str, Any]:
    """Global and per-model parameters by their YAML names; int8_mask has no effect on values."""
    params = {**case.params["params"], **case.params.get("tensor_params", {})}
    params.pop("int8_mask", None)
    return params


@adapter(*(f"mergekit.{method}" for method in _ELEMENTWISE))
def elementwise(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    base, experts = case.inputs.get("base"), list(case.inputs["experts"])
    method = case.op.removeprefix("mergekit.")
    stored = case.masks(len(experts)) if "mask0" in case.outputs else None
    options: dict[str, Any] = {"preset": "mergekit", "compat": _compat(case), **_parameters(case)}
    if stored is not None:
        options["masks"] = stored
    merged = mf.merge(
        base, experts, method, backend=backend, out=target(experts[0], wide), **options
    )
    outputs = {"merged": merged}
    if stored is not None:
        found = mf.merge(base, experts, method, details=True, **options)
        for k in range(len(experts)):
            outputs[f"mask{k}"] = found.keep_masks[k]
            if f"prob{k}" in case.outputs:
                outputs[f"prob{k}"] = found.keep_probability[k]
    return outputs


@adapter("mergekit.slerp")
def slerp(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    base = case.inputs["base"]
    merged = mf.merge(
        base, list(case.inputs["experts"]), "slerp", preset="mergekit", backend=backend,
        t=case.params["params"]["t"], out=target(base, wide),
    )  # fmt: skip
    return {"merged": merged}


@adapter("mergekit.passthrough")
def passthrough(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    experts = list(case.inputs["experts"])
    scale = case.params["tensor_params"].get("scale", [None])[0]
    merged = mf.merge(
        None, experts, "passthrough", preset="mergekit", scale=scale, backend=backend,
        out=target(experts[0], wide),
    )  # fmt: skip
    return {"merged": merged}


def _trimmed(case: GoldenCase, wide: bool, mask: Tensor | None = None) -> Tensor:
    params = case.params
    trimmed, _ = mf.trim(
        upcast(case.inputs["t"], wide),
        _RULES[params["method"]],
        params["density"],
        gamma=params.get("gamma", 0.01),
        epsilon=params.get("epsilon", 0.15),
        rescale=params["rescale_norm"],
        mask=mask,
        rank_dim1=True,
    )
    return trimmed


@adapter("mergekit.sparsify", torch_only=True)
def sparsify(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    return {"sparse": _trimmed(case, wide)}


@adapter("mergekit.sparsify_random", torch_only=True)
def sparsify_random(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    params, mask = case.params, case.outputs["mask"]
    ranked = params["method"] == "della_magprune"
    extra = {"epsilon": params["epsilon"]} if ranked else {}
    found = mf.merge_task_vectors(
        [case.inputs["t"]], "della_linear" if ranked else "dare_linear", preset="mergekit",
        density=params["density"], masks=[mask], rescale=params["rescale_norm"] or "none",
        details=True, **extra,
    )  # fmt: skip
    probability = found.keep_probability[0]
    if not isinstance(probability, Tensor):
        probability = mask.new_full(mask.shape, probability, dtype=case.outputs["prob"].dtype)
    return {"sparse": _trimmed(case, wide, mask), "prob": probability, "mask": found.keep_masks[0]}

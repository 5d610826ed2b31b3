"""Recorded merges of adapters by PEFT's ``add_weighted_adapter``, by PEFT with the replacement."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft", reason="peft is not installed: pip install 'magic_fast[peft]'")

import peft

from golden.golden_case import GoldenCase, load_cases, mismatch, why_absent
from magic_fast.integrations import peft as front

CASES = [
    case
    for case in load_cases()
    if case.op == "peft.add_weighted_adapter"
    and "dare" not in case.params["combination_type"]  # other draws: test_peft_functions.py
]
PARAMS = [pytest.param(c, id=c.id) for c in CASES] or [
    pytest.param(None, id="absent", marks=pytest.mark.skip(reason=why_absent() or "no such case"))
]


def _model(case: GoldenCase) -> Any:
    """PEFT's model of a case, its adapters 0, 1, … filled in."""
    arch = case.params["arch"]
    layers = {
        "emb": nn.Embedding(arch["vocab"], arch["d"]),
        "fc1": nn.Linear(arch["d"], arch["h"]),
        "fc2": nn.Linear(arch["h"], arch["dout"]),
    }
    model: Any = None
    for k, settings in enumerate(case.params["adapters"]):
        config = peft.LoraConfig(target_modules=list(case.params["target_modules"]), **settings)
        if model is None:
            model = peft.get_peft_model(nn.ModuleDict(layers), config, adapter_name=str(k))
        else:
            model.add_adapter(str(k), config)
        for name, value in case.model(f"adapter{k}").items():
            layer, _, factor = name.rpartition(".")
            _place(model.base_model.model[layer], factor, str(k)).copy_(value)
    return model


def _place(layer: Any, factor: str, adapter: str) -> Tensor:
    held: Mapping[str, Any] = getattr(layer, factor)
    if adapter in held:
        weight: Tensor = held[adapter].weight.data
        return weight
    embedded: Tensor = getattr(layer, factor.replace("lora_", "lora_embedding_"))[adapter].data
    return embedded


@pytest.mark.parametrize("case", PARAMS)
def test_recorded(case: GoldenCase) -> None:
    params = case.params
    kind, weights = params["combination_type"], list(params["weights"])
    names = [str(k) for k in range(len(weights))]
    options = {
        name: params[name]
        for name in ("density", "majority_sign_method", "svd_rank")
        if params.get(name) is not None
    }
    with warnings.catch_warnings(), torch.no_grad(), front.install():
        warnings.simplefilter("ignore")
        model = _model(case)
        if kind.endswith("svd") and len(weights) > 1:
            # Recorded from a release that applied an adapter's scaling twice; later ones do once.
            layer = model.base_model.model["fc1"]
            weights = [w * layer.scaling[name] for w, name in zip(weights, names, strict=True)]
        model.add_weighted_adapter(names, weights, "merged", kind, **options)
    checked = 0
    for output, want in case.outputs.items():
        name, _, what = output.rpartition(".")
        layer = model.base_model.model[name]
        if what == "delta":
            got = layer.get_delta_weight("merged").detach()
        elif what in ("lora_A", "lora_B"):
            got = _place(layer, what, "merged")
        else:
            continue
        why = mismatch(got, want, case.tolerance(output, float32=False))
        assert why is None, f"{output}: {why}"
        checked += 1
    assert checked >= 1

"""Every method from a YAML on sharded checkpoints: what mf.merge computes, with and without WSC."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf
from magic_fast.methods.registry import find_method, names

# parameters of the YAML; a method that is not here runs with its defaults
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.4, "normalize": False},
    "average": {"lambda": 0.9, "align": "min_norm"},
    "task_arithmetic": {"weight": 0.7, "normalize": True},
    "ties": {"density": 0.3, "lambda": 0.8},
    "magnitude_prune": {"density": 0.3, "rescale": "l1"},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4, "rescale": False},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.8, "gamma": 0.05},
    "passthrough": {"scale": 0.9},
    "slerp": {"t": 0.3, "per_row": True},
    "nuslerp": {"weight": 0.5, "nuslerp_flatten": False},
    "multislerp": {"normalize_weights": True},
    "karcher": {"max_iter": 5},
    "model_stock": {"filter_wise": True},
    "nearswap": {"t": 0.001},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 1e-4},
    "ramplus_tl": {"epsilon": 1e-4, "r": 0.2},
    "pcb": {"ratio": 0.2, "lambda": 1.1},
    "magmax": {"scale": 0.4},
    "consensus_ta": {"on": "ties", "density": 0.3, "min_tasks": 2, "tall_mask_lambda": 0.3},
    "della": {"density": 0.4, "epsilon": 0.1},
    "della_linear": {"density": 0.4, "epsilon": 0.1},
    "iso_c": {"lambda": 1.3, "tensors": "proj"},
    "iso_cts": {"common_space_fraction": 0.5},
    "tsv_m": {"lambda": 0.8},
    "star": {"eta": 0.3},
}
METHODS = names()
SPECTRAL = ("iso_c", "iso_cts", "tsv_m", "star")


def count_of(method: str) -> int:
    """Three experts, or as many as it takes."""
    spec = find_method(method)
    return max(spec.min_experts, min(3, spec.max_experts or 3))


def load(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def config_of(method: str, models: Path, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / f"expert-{k}")} for k in range(count_of(method))],
        "parameters": PARAMETERS.get(method, {}),
        **changes,
    }


def text(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config)


def in_memory(method: str, models: Path, **settings: Any) -> dict[str, Tensor]:
    named = {"lambda": "scale", "weight": "weights"}
    parameters = {named.get(n, n): v for n, v in PARAMETERS.get(method, {}).items()}
    experts = [load(models / f"expert-{k}") for k in range(count_of(method))]
    base = None if find_method(method).base == "none" else load(models / "base")
    merged: dict[str, Tensor] = mf.merge(
        base, experts, method, preset="mergekit", **({"backend": "torch"} | parameters | settings)
    )
    return merged


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.mark.parametrize("method", METHODS)
def test_yaml_is_the_call(method: str, tiny_models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = mf.merge_checkpoints(text(config_of(method, tiny_models)), out, backend="torch")
    same(load(out), in_memory(method, tiny_models))
    assert not any(t.calibrated for t in report.tensors)


@pytest.mark.parametrize("method", METHODS)
def test_wsc_follows(method: str, tiny_models: Path, tmp_path: Path) -> None:
    config, out = text(config_of(method, tiny_models, calibrate="wsc")), tmp_path / "out"
    report = mf.merge_checkpoints(config, out, backend="torch")
    assert sum(t.calibrated for t in report.tensors) == 14  # seven matrices a layer
    if find_method(method).base != "none":
        same(load(out), in_memory(method, tiny_models, calibrate="wsc"))
        return
    # a method on whole models: the base is there for the calibration alone, which the call on
    # tensors takes as a step of its own
    models = [load(tiny_models / m) for m in ("base", *(f"expert-{k}" for k in range(3)))]
    base, *experts = ({n: t.float() for n, t in m.items()} for m in models)
    experts = experts[: count_of(method)]
    named = {"weight": "weights"}
    parameters = {named.get(n, n): v for n, v in PARAMETERS[method].items()}
    merged = mf.merge(None, experts, method, preset="mergekit", backend="torch", **parameters)
    want, _ = mf.calibrate_weights(base, experts, merged)
    for name, tensor in load(out).items():  # bfloat16's ulp is 2⁻⁷ of the number at most
        torch.testing.assert_close(tensor.float(), want[name], rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("method", SPECTRAL)
def test_spectral_methods_are_the_decomposition(
    method: str, tiny_models: Path, tmp_path: Path
) -> None:
    """By products, from sharded files, against singular value decompositions in float64."""
    out = tmp_path / "out"
    mf.merge_checkpoints(text(config_of(method, tiny_models, out_dtype="float32")), out)
    wide = [load(tiny_models / m) for m in ("base", *(f"expert-{k}" for k in range(3)))]
    base, *experts = ({n: t.double() for n, t in model.items()} for model in wide)
    parameters = dict(PARAMETERS[method])
    scale = parameters.pop("lambda", 1.0)
    exact = {} if method == "star" else {"svd": "exact"}  # star has no other way
    want = mf.merge(base, experts, method, scale=scale, **parameters, **exact)
    for name, tensor in load(out).items():
        error = (tensor.double() - want[name]).norm()
        # 1e-3 of Δ, and half an ulp of the float32 output
        assert error <= 1e-3 * (want[name] - base[name]).norm() + 2**-24 * want[name].norm(), name


def test_gradients_and_weights_per_model(tiny_models: Path, tmp_path: Path) -> None:
    """t runs from 0 in the first layer to 1 in the last; each model has a weight of its own."""
    base = load(tiny_models / "base")
    experts = [load(tiny_models / f"expert-{k}") for k in range(3)]
    config = config_of("nearswap", tiny_models, parameters={"t": [0.0, 1.0]})
    mf.merge_checkpoints(text(config), tmp_path / "swap")
    got = load(tmp_path / "swap")
    first, last = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    assert torch.equal(got[first], base[first])  # t = 0
    assert torch.equal(got[last], experts[0][last])  # t = 1: all differences are smaller
    config = config_of("multislerp", tiny_models)
    for k, entry in enumerate(config["models"]):
        entry["parameters"] = {"weight": [0.1 + k, 0.3]}
    mf.merge_checkpoints(text(config), tmp_path / "weighted")
    got = load(tmp_path / "weighted")
    for name, weights in ((first, [0.1, 1.1, 2.1]), (last, [0.3, 0.3, 0.3])):
        rows = [e[name] for e in experts]
        assert torch.equal(got[name], mf.merge(base[name], rows, "multislerp", weights=weights))


@pytest.mark.parametrize("listed", [True, False])
def test_karcher_counts_its_base(listed: bool, tiny_models: Path, tmp_path: Path) -> None:
    """Named under base_model, listed or not, the base is one of the models; without base_model
    only the listed ones are."""
    config = config_of("karcher", tiny_models)
    if listed:
        config["models"].insert(0, {"model": config["base_model"]})
    mf.merge_checkpoints(text(config), tmp_path / "out")
    same(load(tmp_path / "out"), in_memory("karcher", tiny_models))
    del config["base_model"]
    config["models"] = config["models"][-3:]
    mf.merge_checkpoints(text(config), tmp_path / "without")
    experts = [load(tiny_models / f"expert-{k}") for k in range(3)]
    want = mf.merge(None, experts, "karcher", max_iter=5)
    same(load(tmp_path / "without"), want)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_without_a_base_whole_weights_are_merged(
    method: str, tiny_models: Path, tmp_path: Path
) -> None:
    config = config_of(method, tiny_models, parameters={})
    del config["base_model"]
    mf.merge_checkpoints(text(config), tmp_path / "out")
    experts = [load(tiny_models / f"expert-{k}") for k in range(len(config["models"]))]
    same(load(tmp_path / "out"), mf.merge(None, experts, method))


# passthrough has one model, which nothing disagrees with
@pytest.mark.parametrize("method", [m for m in METHODS if m != "passthrough"])
def test_vocabularies_of_different_sizes(method: str, tiny_models: Path, tmp_path: Path) -> None:
    """A clear error before anything is written; the leading rows where the user asks for that."""
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    for file in (models / "expert-0").glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            rows = tensors["model.embed_tokens.weight"]
            tensors["model.embed_tokens.weight"] = torch.cat([rows, rows[:2]])
            save_file(tensors, file, metadata={"format": "pt"})
    config, out = text(config_of(method, models)), tmp_path / "out"
    with pytest.raises(mf.InputError, match=r"shape of 'model.embed_tokens.weight' in .*expert-0"):
        mf.merge_checkpoints(config, out)
    assert not out.exists()
    mf.merge_checkpoints(config, out, allow_embedding_truncation=True)
    same(load(out), in_memory(method, tiny_models, backend=None))

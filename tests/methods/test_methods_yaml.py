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
from magic_fast.methods.parameters import available_methods

# method → (number of experts, parameters of the YAML)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "slerp": (1, {"t": 0.3, "per_row": True}),
    "nuslerp": (2, {"weight": 0.5, "nuslerp_flatten": False}),
    "multislerp": (3, {"normalize_weights": True}),
    "karcher": (3, {"max_iter": 5}),
    "model_stock": (3, {"filter_wise": True}),
    "nearswap": (1, {"t": 0.001}),
    "arcee_fusion": (1, {}),
    "sce": (3, {"select_topk": 0.5}),
    "ram": (3, {"epsilon": 1e-4}),
    "ramplus_tl": (3, {"epsilon": 1e-4, "r": 0.2}),
    "pcb": (3, {"ratio": 0.2, "lambda": 1.1}),
    "magmax": (3, {"scale": 0.4}),
    "emr_unified": (3, {}),
    "consensus_ta": (3, {"on": "ties", "density": 0.3, "min_tasks": 2, "tall_mask_lambda": 0.3}),
    "della": (3, {"density": 0.4, "epsilon": 0.1}),
    "della_linear": (3, {"density": 0.4, "epsilon": 0.1}),
}


def load(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def config_of(method: str, models: Path, **changes: Any) -> dict[str, Any]:
    count, parameters = CASES[method]
    return {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / f"expert-{k}")} for k in range(count)],
        "parameters": parameters,
        **changes,
    }


def text(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config)


def in_memory(method: str, models: Path, **settings: Any) -> dict[str, Tensor]:
    count, parameters = CASES[method]
    parameters = {{"lambda": "scale"}.get(n, n): v for n, v in parameters.items()}
    merged: dict[str, Tensor] = mf.merge(
        load(models / "base"), [load(models / f"expert-{k}") for k in range(count)], method,
        preset="mergekit", backend="torch", **parameters, **settings,
    )  # fmt: skip
    return merged


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.mark.parametrize("calibrate", [None, "wsc"])
@pytest.mark.parametrize("method", CASES)
def test_yaml_is_the_call(
    method: str, calibrate: str | None, tiny_models: Path, tmp_path: Path
) -> None:
    config = config_of(method, tiny_models, **({"calibrate": calibrate} if calibrate else {}))
    out = tmp_path / "out"
    report = mf.merge_checkpoints(text(config), out, backend="torch")
    same(load(out), in_memory(method, tiny_models, calibrate=calibrate))
    assert any(t.calibrated for t in report.tensors) == (calibrate is not None)


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


def test_pcb_wants_one_ratio_for_a_model(tiny_models: Path, tmp_path: Path) -> None:
    ratios = [{"filter": "mlp", "value": 0.2}, {"value": 0.1}]
    config = config_of("pcb", tiny_models, parameters={"ratio": ratios})
    with pytest.raises(mf.InputError, match=r"ratio and scope of method 'pcb' for 'model.layers.0"):
        mf.merge_checkpoints(text(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config["parameters"]["scope"] = "tensor"
    mf.merge_checkpoints(text(config), tmp_path / "out")


@pytest.mark.parametrize("method", sorted(CASES))
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
    if method in ("karcher", "pcb", "consensus_ta"):  # a member base, a whole model, a recipe
        mf.merge_checkpoints(config, out, allow_embedding_truncation=True)
        same(load(out), in_memory(method, tiny_models))


def test_every_available_method_is_in_a_test_of_this_kind() -> None:
    elsewhere = {
        "average", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "linear",
        "magnitude_prune", "passthrough", "task_arithmetic", "ties",
    }  # fmt: skip
    spectral = {"iso_c", "iso_cts", "tsv_m", "star"}
    assert set(available_methods()) - elsewhere - spectral == set(CASES)

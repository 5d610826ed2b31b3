"""Gradients over depth and filters by name, for every parameter of every method: each tensor is
merged as with its own value everywhere, or the configuration is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import magic_fast as mf
from magic_fast.cli.demo_data import LlamaShape, write_checkpoints
from magic_fast.methods.arguments import python_name
from magic_fast.methods.registry import find_method, names
from magic_fast.methods.spec import ParameterSpec

SHAPE = LlamaShape(hidden=16, layers=3, ffn=24, vocab=32, heads=2, kv_heads=1, shard_bytes=4 * 1024)
# two values of each parameter between which a tensor of these models tells the difference; by
# method and parameter where the methods differ
VALUES: dict[str, tuple[Any, Any]] = {
    "weight": (0.3, 0.9),
    "density": (0.4, 0.6),
    "gamma": (0.05, 0.2),
    "epsilon": (0.05, 0.3),
    "ram.epsilon": (1e-5, 3e-4),
    "ramplus_tl.epsilon": (1e-5, 3e-4),
    "lambda": (0.5, 1.5),
    "scale": (0.5, 1.5),
    "normalize": (False, True),
    "normalize_weights": (False, True),
    "align": ("none", "min_norm"),
    "vote": ("mass", "count"),
    "reduce": ("sum", "max"),
    "rescale": ("none", "l1"),
    "t": (0.2, 0.8),
    "nearswap.t": (1e-4, 3e-4),
    "per_row": (False, True),
    "filter_wise": (False, True),
    "nuslerp_flatten": (True, False),
    "nuslerp_row_wise": (False, True),
    "eps": (1e-8, 1e-4),
    "max_iter": (1, 3),
    "tol": (1e-5, 0.9),
    "select_topk": (0.3, 0.9),
    "r": (0.1, 2.0),
    "alpha": (0.1, 0.9),
    "tall_mask_lambda": (0.2, 0.6),
    "on": ("sum", "ties"),
    "min_tasks": (1, 3),
    "ratio": (0.1, 0.6),
    "scope": ("tensor", "model"),
    "svd": ("auto", "exact"),
    "tensors": ("proj", "nothing"),
    "common_space_fraction": (0.2, 0.9),
    "eta": (0.3, 0.8),
}
# what else must be set for a parameter to be of effect
BESIDE: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.4},
    "nearswap": {"t": 2e-4},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "consensus_ta.rescale": {"density": 0.5},
    "ramplus_tl": {"r": 1.0, "alpha": 0.5},
    "nuslerp.nuslerp_row_wise": {"nuslerp_flatten": False},
    "karcher.max_iter": {"tol": 0.0},
    "multislerp.weight": {"normalize_weights": False},
    "pcb.ratio": {"scope": "tensor"},
}
# the scopes of a method's tensors cannot be mixed
WHOLE_MODEL = {"pcb.scope"}
CASES = [
    (m, p.name)
    for m in names()
    for p in find_method(m).parameters
    if f"{m}.{p.name}" not in WHOLE_MODEL
]
OF_EXPERTS = [(m, n) for m, n in CASES if find_method(m).find(n).scope == "per_model"]
# of both models alike it says nothing: t = w₁ ÷ (w₀ + w₁)
ALIKE_IS_NOTHING = {("nuslerp", "weight")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers: a gradient has a middle."""
    folder = tmp_path_factory.mktemp("three-layers")
    write_checkpoints(folder, SHAPE, num_experts=3, seed=0)
    return folder


@cache
def load(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def values_of(method: str, name: str) -> tuple[Any, Any]:
    return VALUES.get(f"{method}.{name}", VALUES.get(name, (None, None)))


def beside(method: str, name: str) -> dict[str, Any]:
    found = {**BESIDE.get(method, {}), **BESIDE.get(f"{method}.{name}", {})}
    return {n: v for n, v in found.items() if n != name}


def spec_of(method: str, name: str) -> ParameterSpec:
    found = find_method(method).find(name)
    assert found is not None
    return found


def setting_of(spec: ParameterSpec, low: Any, high: Any) -> list[dict[str, Any]]:
    """``high`` but for layer 1 (``low``) and the MLPs, whose values run over the depth."""
    mlp = [low, high] if spec.numeric else low
    return [{"filter": "mlp", "value": mlp}, {"filter": "layers.1.", "value": low},
            {"value": high}]  # fmt: skip


def value_for(tensor: str, spec: ParameterSpec, low: Any, high: Any) -> Any:
    """The same, by the rule written down a second time."""
    layer = int(tensor.split(".")[2]) if ".layers." in tensor else None
    if "mlp" in tensor and spec.numeric:
        return {0: low, 1: type(low)((low + high) / 2), 2: high}[layer]
    return low if "mlp" in tensor or layer == 1 else high


def count_of(method: str) -> int:
    spec = find_method(method)
    return max(spec.min_experts, min(3, spec.max_experts or 3))


def config_of(
    method: str, models: Path, parameters: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    listed = [{"model": str(models / f"expert-{k}")} for k in range(count_of(method))]
    config = {"merge_method": method, "base_model": str(models / "base"), "models": listed,
              "parameters": parameters, "dtype": dtype_of(method)}  # fmt: skip
    return {**config, **changes}


def dtype_of(method: str) -> str:
    """karcher's second step is too small for float32 to show it."""
    return "float64" if method == "karcher" else "float32"


def merged(config: dict[str, Any], out: Path) -> dict[str, Tensor]:
    mf.merge_checkpoints(yaml.safe_dump(config), out)
    files = sorted(out.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def constant(method: str, name: str, models: Path, value: Any) -> dict[str, Tensor]:
    """In memory, with one value for all tensors (a list: one for each expert)."""
    arguments = {**beside(method, name), name: value}
    named = {python_name(spec_of(method, n)): v for n, v in arguments.items()}
    own = [load(models / m) for m in ("base", *(f"expert-{k}" for k in range(3)))]
    dtype = getattr(torch, dtype_of(method))
    base, *experts = ({n: t.to(dtype) for n, t in m.items()} for m in own)
    start = None if find_method(method).base == "none" else base
    found: dict[str, Tensor] = mf.merge(
        start, experts[: count_of(method)], method, preset="mergekit", **named
    )
    return found


def judge(
    got: dict[str, Tensor], want: Callable[[Any], dict[str, Tensor]], pick: Callable[[str], Any],
    low: Any, high: Any,
) -> None:  # fmt: skip
    """Every tensor is that of the merge with its value, and it matters which value that is."""
    known = {value: want(value) for value in {low, high, *map(pick, got)}}

    def differing(chosen: Callable[[str], Any]) -> list[str]:
        return [name for name, t in got.items() if not torch.equal(t, known[chosen(name)][name])]

    assert differing(pick) == []
    assert differing(lambda name: low) and differing(lambda name: high)


@pytest.mark.parametrize(("method", "name"), [c for c in CASES if c not in ALIKE_IS_NOTHING])
def test_each_tensor_has_its_own_value(
    method: str, name: str, models: Path, tmp_path: Path
) -> None:
    spec, (low, high) = spec_of(method, name), values_of(method, name)
    parameters = {**beside(method, name), name: setting_of(spec, low, high)}
    got = merged(config_of(method, models, parameters), tmp_path / "out")
    judge(
        got, lambda value: constant(method, name, models, value),
        lambda tensor: value_for(tensor, spec, low, high), low, high,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "name"), OF_EXPERTS)
def test_each_expert_has_its_own_value(
    method: str, name: str, models: Path, tmp_path: Path
) -> None:
    """The last expert's setting goes before the one that all share."""
    spec, (low, high) = spec_of(method, name), values_of(method, name)
    config = config_of(method, models, {**beside(method, name), name: low})
    config["models"][-1]["parameters"] = {name: setting_of(spec, low, high)}
    others = [low] * (count_of(method) - 1)
    judge(
        merged(config, tmp_path / "out"),
        lambda value: constant(method, name, models, [*others, value]),
        lambda tensor: value_for(tensor, spec, low, high), low, high,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "name"), [c for c in CASES if not spec_of(*c).numeric])
def test_only_numbers_have_gradients(method: str, name: str, models: Path, tmp_path: Path) -> None:
    config = config_of(method, models, {**beside(method, name), name: [*values_of(method, name)]})
    wrong = rf"gradient of something that is not a number for parameters\.{name} "
    with pytest.raises(mf.ConfigError, match=wrong):
        mf.merge_checkpoints(yaml.safe_dump(config), tmp_path / "out")


MIXED = [
    ("ties", "ties_merging", "density", 0.4, {"density": 0.2}),
    ("ties", "fusion_bench", "rescale", "l1", {"rescale": "none"}),
    ("ties", "fusion_bench", "align", "min_norm", {"align": "none"}),
    ("ties", "ties_merging", "vote", "count", {"vote": "mass"}),
    ("ties", "ties_merging", "weight", 0.4, {"weight": 1.0}),
    ("consensus_ta", "magic", "density", 0.4, {"density": 0.2}),
    ("pcb", "default", "ratio", 0.4, {"ratio": 0.1}),
    ("pcb", "default", "scope", "tensor", {"scope": "model"}),
    ("pcb", "default", "scope", "model", {"scope": "tensor"}),
]


@pytest.mark.parametrize(
    ("method", "preset", "name", "value", "rest"),
    MIXED,
    ids=[f"{c[1]}-{c[2]}" for c in MIXED[:-1]] + ["default-scope-model"],
)
def test_what_tensors_share_cannot_vary(
    method: str,
    preset: str,
    name: str,
    value: Any,
    rest: dict[str, Any],
    models: Path,
    tmp_path: Path,
) -> None:
    """One threshold, or one set of quantiles, of the whole model: refused before anything is
    read."""
    (other,) = rest.values()
    settings = {name: [{"filter": "layers.1.mlp", "value": value}, {"value": other}]}
    config = config_of(method, models, settings, preset=preset)
    under = "scope 'model'" if method == "pcb" else f"preset '{preset}'"
    with pytest.raises(mf.InputError) as refused:
        mf.plan_checkpoints(yaml.safe_dump(config), tmp_path / "out")
    message = str(refused.value)
    assert message.startswith(f"{name} of method '{method}' for 'model.")
    assert f"All tensors are looked at together under {under}: give one value, or " in message
    # one value is fine, and so is what each tensor may have for itself
    config["parameters"] = {name: other, "lambda": [0.5, 1.0]}
    mf.merge_checkpoints(yaml.safe_dump(config), tmp_path / "out")


def test_the_whole_refusal(models: Path, tmp_path: Path) -> None:
    config = config_of("ties", models, {"density": [0.2, 0.4]}, preset="ties_merging")
    with pytest.raises(mf.InputError) as refused:
        mf.plan_checkpoints(yaml.safe_dump(config), tmp_path / "out")
    assert str(refused.value) == (
        "density of method 'ties' for 'model.layers.1.input_layernorm.weight': expected 0.2 as "
        "for 'model.embed_tokens.weight', got 0.3. All tensors are looked at "
        "together under preset 'ties_merging': give one value, or preset 'default'."
    )

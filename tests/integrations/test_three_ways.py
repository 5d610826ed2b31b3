"""The same YAML by mergekit, by mergekit with ours inside, and by our engine: what differs is a
tie, a vote near zero or mergekit's own rounding (benchmarks/dropin/three_way.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def three_way() -> ModuleType:
    path = ROOT / "benchmarks" / "dropin" / "three_way.py"
    spec = importlib.util.spec_from_file_location("three_way", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models(tiny_models: Path) -> list[Path]:
    return [tiny_models / "base", *(tiny_models / f"expert-{k}" for k in range(3))]


FAST = ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")


@pytest.mark.parametrize(
    "method",
    [
        *FAST,
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in (
                "sce",
                "model_stock",
                "karcher",
                "multislerp",
                "ram",
                "ramplus_tl",
                "slerp",
                "nuslerp",
            )
        ),
        pytest.param("nearswap", marks=pytest.mark.slow),
    ],
)
def test_every_difference_has_its_reason(
    registry: dict[str, Any],
    three_way: ModuleType,
    tiny_models: Path,
    tmp_path: Path,
    method: str,
) -> None:
    exact = None
    if method in three_way.NORMS:
        exact = three_way.in_double(models(tiny_models), method, tmp_path)
    for dtype in ("float32", "bfloat16"):
        made = three_way.results(models(tiny_models), method, dtype, tmp_path)
        found = three_way.compare(models(tiny_models), made, method, dtype, exact)
        for way, counts in found.items():
            assert counts.elements == 156_480
            assert counts.other == 0, (dtype, way, counts)
            assert counts.differ < counts.elements * 0.3  # nothing hides behind its reason
            assert counts.all_ties < counts.elements * 0.1
            assert counts.all_votes < counts.elements * 0.1
        exact = exact or made["mergekit"]


def test_a_wrong_value_has_no_reason(
    registry: dict[str, Any], three_way: ModuleType, tiny_models: Path, tmp_path: Path
) -> None:
    """The comparison sees one element that another merge would give."""
    made = three_way.results(models(tiny_models), "ties", "float32", tmp_path)
    (file,) = sorted(made["engine"].glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    base = importlib.import_module("differences").Model(tiny_models / "base")[name].float()
    moved = (tensors[name] != base).nonzero()[0]
    tensors[name][tuple(moved)] = base[tuple(moved)]
    save_file(tensors, file)
    found = three_way.compare(models(tiny_models), made, "ties", "float32")
    assert (found["engine"].other, found["inside"].other) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_agree_in_statistics(
    registry: dict[str, Any], three_way: ModuleType, tiny_models: Path, tmp_path: Path, method: str
) -> None:
    made = three_way.results(models(tiny_models), method, "float32", tmp_path)
    shares, norms = zip(
        *(three_way.moved(models(tiny_models), path) for path in made.values()), strict=True
    )
    # 156480 elements, a share of 0.68 to 0.73: 5 σ of a difference are 0.0083
    assert max(shares) - min(shares) < 0.0083
    torch.testing.assert_close(max(norms), min(norms), rtol=0.02, atol=0)

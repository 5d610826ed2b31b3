"""Documents that only the engine reads anew: modules, a slice's own base, several merges in one
file; each against mergekit itself, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import magic_fast as mf
from support.models import assert_same, load


def slice_of(layer: int, *models: Path, base: Path | None = None, **parameters: Any) -> Any:
    """One layer of the first model, with its parameters, and of the others."""
    sources: list[dict[str, Any]] = [
        {"model": str(model), "layer_range": [layer, layer + 1]} for model in models
    ]
    sources[0]["parameters"] = parameters
    own = {} if base is None else {"base_model": str(base), "residual_weight": 0.5}
    return {"sources": sources, **own}


def test_modules_with_slices_of_other_bases(
    registry: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    base, first, second, other = (
        tiny_models / name for name in ("base", "expert-0", "expert-1", "expert-2")
    )
    slices = [slice_of(0, first, other, base=other, weight=0.5), slice_of(1, second, base)]
    slices[1]["sources"][0]["parameters"] = {"weight": 0.7}
    text = yaml.safe_dump(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "dtype": "float32",
            "modules": {"default": {"slices": slices, "parameters": {"lambda": 0.8}}},
        }
    )
    mf.merge_checkpoints(text, tmp_path / "ours")
    own = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(own, str(tmp_path / "theirs"), MergeOptions(copy_tokenizer=False, quiet=True))
    assert_same(load(tmp_path / "ours"), load(tmp_path / "theirs"))


def test_several_documents(registry: dict[str, Any], tiny_models: Path, tmp_path: Path) -> None:
    click = pytest.importorskip("click.testing")
    from mergekit.scripts.multimerge import main

    first, second, third = (str(tiny_models / f"expert-{k}") for k in range(3))
    documents = [
        {
            "merge_method": "slerp",
            "base_model": "one",
            "models": [{"model": "one"}, {"model": "two"}],
            "parameters": {"t": 0.5},
        },
        {
            "name": "two",
            "merge_method": "task_arithmetic",
            "base_model": str(tiny_models / "base"),
            "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("one", third)],
        },
        {
            "name": "one",
            "merge_method": "linear",
            "models": [
                {"model": m, "parameters": {"weight": w}} for m, w in ((first, 1), (second, 2))
            ],
        },
    ]
    path = tmp_path / "series.yml"
    path.write_text(yaml.safe_dump_all([d | {"dtype": "float32"} for d in documents]))
    mf.merge_series(path, tmp_path / "ours")
    result = click.CliRunner().invoke(
        main, [str(path), "--out-path", str(tmp_path / "theirs"), "-I", str(tmp_path / "parts")]
    )
    assert result.exit_code == 0, result.output
    assert_same(load(tmp_path / "ours"), load(tmp_path / "theirs"))

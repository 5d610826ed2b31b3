"""What the engine writes is opened by the libraries that its users open it with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import magic_fast as mf
from engine.engine_models import MIB, different, read_out


def config_of(models: Path) -> str:
    experts = "".join(f"- model: {models}/expert-{k}\n" for k in range(3))
    return (
        f"merge_method: ties\nbase_model: {models}/base\nmodels:\n{experts}"
        "parameters: {density: 0.2, weight: 0.5}\ndtype: bfloat16\ncalibrate: wsc\n"
    )


def test_safetensors_opens_every_shard(tiny_models: Path, tmp_path: Path) -> None:
    report = mf.merge_checkpoints(
        config_of(tiny_models), tmp_path / "out", memory=4 * MIB, max_shard_size=70_000
    )
    names = []
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            names += list(file.keys())
            assert all(bool(file.get_tensor(n).float().isfinite().all()) for n in file.keys())
    assert sorted(names) == sorted(t.name for t in report.tensors)


def test_transformers_loads_the_merged_model(tiny_models: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    mf.merge_checkpoints(config_of(tiny_models), tmp_path / "out", max_shard_size=70_000)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    stored = read_out(tmp_path / "out")
    state = {n: t for n, t in model.state_dict().items() if n in stored}
    assert different(state, stored) == []
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, model.config.vocab_size) and bool(logits.isfinite().all())

"""Checkpoints on disk for tests: read back, configured, and merged in memory for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import magic_fast as mf


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def write_config(folder: Path, checkpoints: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(checkpoints / "base"),
        "models": [{"model": str(checkpoints / f"expert-{k}")} for k in range(3)],
        "parameters": {"density": 0.2},
        "dtype": "bfloat16",
        "calibrate": "wsc",
    }
    path = folder / "merge.yml"
    kept = {key: value for key, value in (settings | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(kept))
    return path


def in_memory(models: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    """The same merge by ``mf.merge``."""
    experts = [load(models / f"expert-{k}") for k in range(3)]
    settings: dict[str, Any] = {"density": 0.2, "calibrate": "wsc", "preset": "mergekit"}
    merged: dict[str, torch.Tensor] = mf.merge(
        load(models / "base"), experts, "ties", **settings | arguments
    )
    return merged


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name

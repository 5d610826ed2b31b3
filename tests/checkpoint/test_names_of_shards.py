"""A component of diffusers is written under the names that diffusers looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import magic_fast as mf
from magic_fast.checkpoint import open_checkpoint

STEM = "diffusion_pytorch_model"


def component(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    tensors = {f"down_blocks.{k}.weight": torch.randn(8, 8) for k in range(3)}
    name = STEM if "_class_name" in config else "model"
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("size", [5 * 10**9, 300], ids=["single", "shards"])
@pytest.mark.parametrize(
    ("config", "stem"),
    [({"_class_name": "UNet2DConditionModel"}, STEM), ({"model_type": "clip_text_model"}, "model")],
)
def test_names(config: dict[str, Any], stem: str, size: int, tmp_path: Path) -> None:
    paths = [component(tmp_path / name, config) for name in "ab"]
    models = [{"model": path, "parameters": {"weight": 0.5}} for path in paths]
    document = {"merge_method": "linear", "models": models}
    mf.merge_checkpoints(document, tmp_path / "out", max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "out").glob(f"{stem}*"))
    if size > 300:
        assert files == [f"{stem}.safetensors"]
    else:
        shards = [f"{stem}-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
        assert files == [*shards, f"{stem}.safetensors.index.json"]
        index = json.loads((tmp_path / "out" / files[-1]).read_text())
        assert set(index["weight_map"].values()) == set(shards)
    first, other = (load_file(f"{path}/{'model' if stem == 'model' else STEM}.safetensors")
                    for path in paths)  # fmt: skip
    with open_checkpoint(tmp_path / "out") as model:
        for name in first:
            found = torch.frombuffer(model.read(name), dtype=torch.float32).view(8, 8)
            torch.testing.assert_close(found, (first[name] + other[name]) / 2)

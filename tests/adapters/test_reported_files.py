"""Files that people bring: headers of kohya, unlike prefixes, compiled models, empty factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf

KOHYA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_module": "networks.lora",
    "ss_v2": "False",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}


def factors(prefix: str, down: str, up: str, rank: int = 2) -> dict[str, Tensor]:
    return {f"{prefix}.{down}": torch.randn(rank, 8), f"{prefix}.{up}": torch.randn(8, rank)}


def peft(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(("ranks", "dim"), [((4, 4), "8"), ((4, 8), "12")])
def test_headers_of_kohya_come_along(ranks: tuple[int, int], dim: str, tmp_path: Path) -> None:
    """What both agree on; the rank is the result's."""
    paths = []
    for number, rank in enumerate(ranks):
        tensors = factors("lora_unet_q", "lora_down.weight", "lora_up.weight", rank)
        tensors["lora_unet_q.alpha"] = torch.tensor(float(rank))
        own = {"ss_network_dim": str(rank), "ss_network_alpha": str(rank), "ss_seed": str(number)}
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(tensors, paths[-1], metadata={**KOHYA, **own, "other": "x"})
    mf.merge_adapters(paths, tmp_path / "out.safetensors", "average")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = file.metadata()
    assert header == {"format": "pt", **KOHYA, "ss_network_dim": dim, "ss_network_alpha": dim}


def test_two_names_of_one_module_are_refused(tmp_path: Path) -> None:
    paths = []
    for part in ("transformer", "diffusion_model"):
        path = tmp_path / f"{part}.safetensors"
        save_file(factors(f"{part}.blocks.0.to_q", "lora_A.weight", "lora_B.weight"), path)
        paths.append(path)
    said = r"expected it as 'transformer.blocks.0.to_q', .* begin with 'diffusion_model.'"
    with pytest.raises(mf.CheckpointError, match=said):
        mf.merge_adapters(paths, tmp_path / "out.safetensors", "average")


def test_adapters_of_compiled_models_are_those_of_their_model(tmp_path: Path) -> None:
    plain, compiled = (factors("model.q", "lora_A.weight", "lora_B.weight") for _ in range(2))
    first = peft(tmp_path / "plain", plain)
    other = peft(tmp_path / "compiled", {f"_orig_mod.{k}": v for k, v in compiled.items()})
    mf.merge_adapters([first, other], tmp_path / "out", "average")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(found) == {f"base_model.model.{name}" for name in plain}
    down, up = (found[f"base_model.model.model.q.lora_{x}.weight"] for x in "AB")
    expected = sum(
        x["model.q.lora_B.weight"] @ x["model.q.lora_A.weight"] / 2 for x in (plain, compiled)
    )
    torch.testing.assert_close(up @ down, expected)


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((0, 8), (8, 0))])
def test_empty_factors_are_said_to_be_empty(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    down, up = map(torch.zeros, shapes)
    path = peft(tmp_path / "a", {"q.lora_A.weight": down, "q.lora_B.weight": up})
    with pytest.raises(mf.CheckpointError, match=r"got empty ones, .*DeepSpeed ZeRO-3"):
        mf.merge_adapters([path, path], tmp_path / "out", "average")


def test_trained_biases_are_refused(tmp_path: Path) -> None:
    tensors = factors("q", "lora_A.weight", "lora_B.weight")
    paths = [
        peft(tmp_path / name, {**tensors, "q.base_layer.bias": torch.randn(8)}, bias="all")
        for name in "ab"
    ]
    with pytest.raises(mf.CheckpointError, match=r"'q.bias' .* that was trained whole"):
        mf.merge_adapters(paths, tmp_path / "out", "average")

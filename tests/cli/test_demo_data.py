"""The generator: whole, the same every time, and with the traits it claims."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from magic_fast.cli.demo_data import SMALL, TINY, write_checkpoints


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.*"))
    }


def test_same_bytes_every_time(tiny_models: Path, tmp_path: Path) -> None:
    write_checkpoints(tmp_path, TINY)
    assert digests(tmp_path) == digests(tiny_models)
    write_checkpoints(tmp_path / "other", TINY, num_experts=1, seed=1)
    name = "base/model-00001-of-00003.safetensors"
    assert digests(tmp_path / "other")[name] != digests(tiny_models)[name]


def test_kept_if_whole_and_made_again_if_not(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, TINY, num_experts=1)
    file = tmp_path / "base/config.json"
    file.write_text("kept")
    write_checkpoints(tmp_path, TINY, num_experts=1)
    assert file.read_text() == "kept"
    (tmp_path / "checkpoints.json").unlink()
    write_checkpoints(tmp_path, TINY, num_experts=1)
    assert file.read_text() != "kept"


def test_sizes() -> None:
    assert 140e6 < SMALL.parameters < 160e6


def test_task_vectors_look_like_real_ones(tiny_models: Path) -> None:
    base = load(tiny_models / "base")
    experts = [load(tiny_models / f"expert-{k}") for k in range(3)]
    assert set(base) == {name for name, _ in TINY.tensors()}
    cosines = []
    for name, tensor in base.items():
        assert tensor.dtype == torch.bfloat16
        if tensor.dim() == 1:
            continue
        first, second, _ = ((expert[name].float() - tensor.float()).flatten() for expert in experts)
        moved = (first != 0).float().mean().item()
        assert 0.5 < moved < 0.75, name  # part-sparse: 0.7, less what bfloat16 rounds away
        kurtosis = ((first - first.mean()) ** 4).mean() / first.var() ** 2
        assert kurtosis > 4, name  # a normal has 3
        cosines.append(torch.cosine_similarity(first, second, 0).item())
    assert min(cosines) < 0.12 < 0.25 < max(cosines)  # what experts share differs by layer


def test_transformers_opens_it(tiny_models: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models / "expert-0")
    assert model.config.model_type == "llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models / "expert-0")
    assert tokenizer("w3 w4")["input_ids"] == [6, 7]

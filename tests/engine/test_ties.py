"""Head and embedding are one where their values are, and apart where some model has them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def write(
    folder: Path, head: str | None, *, tie: bool = True, seed: int = 0, dtype: Any = torch.float32
) -> dict[str, Tensor]:
    """A Qwen2 whose head is ``equal`` to the embedding, an ``other`` one, or not stored."""
    torch.manual_seed(seed)
    tensors = {EMBEDDING: torch.randn(16, 8).to(dtype), NORM: torch.randn(8).to(dtype)}
    if head is not None:
        own = torch.zeros(16, 8) if head == "equal" else torch.randn(16, 8)
        tensors[HEAD] = (tensors[EMBEDDING].float() + own).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 16,
        "tie_word_embeddings": tie,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def merged(
    folder: Path, method: str = "task_arithmetic", warnings: list[str] | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:  # fmt: skip
    models = [
        {"model": str(folder / name), "parameters": {"weight": 0.5, **parameters}} for name in "ab"
    ]
    config = {"merge_method": method, "base_model": str(folder / "base"), "models": models}
    report = mf.merge_checkpoints(config, folder / "out")
    if warnings is not None:
        warnings += report.warnings
    return load_file(folder / "out" / "model.safetensors")


def ties(folder: Path) -> bool:
    stated = json.loads((folder / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert isinstance(stated, bool)
    return stated


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della"])
@pytest.mark.parametrize("who", ["base", "a"])
def test_a_copy_that_is_stored_is_merged_once(method: str, who: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, "equal" if name == who else None, seed=seed)
    options = {} if method == "task_arithmetic" else {"density": 0.5}
    assert set(merged(tmp_path, method, **options)) == {EMBEDDING, NORM}
    assert ties(tmp_path)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("who", ["base", "a", "b"])
def test_a_head_of_its_own_unties(who: str, tie: bool, tmp_path: Path) -> None:
    own = {
        name: write(
            tmp_path / name, "other" if name == who else None, tie=tie or name != who, seed=seed
        )
        for seed, name in enumerate(("base", "a", "b"))
    }
    warnings: list[str] = []
    out = merged(tmp_path, warnings=warnings)
    heads = {name: tensors.get(HEAD, tensors[EMBEDDING]) for name, tensors in own.items()}
    for name, values in ((HEAD, heads), (EMBEDDING, {n: t[EMBEDDING] for n, t in own.items()})):
        base = values["base"]
        expected = base + 0.5 * (values["a"] - base) + 0.5 * (values["b"] - base)
        assert torch.allclose(out[name], expected, atol=1e-6), name
    assert not ties(tmp_path)
    (warning,) = [text for text in warnings if HEAD in text]
    assert str(tmp_path / who) in warning


def test_heads_that_no_configuration_ties_stay_as_they_are(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, "equal", tie=False, seed=seed)
    assert set(merged(tmp_path)) == {EMBEDDING, HEAD, NORM}
    assert not ties(tmp_path)


def test_a_base_whose_configuration_does_not_tie_keeps_its_head(tmp_path: Path) -> None:
    """Though it has the embedding's values: a result without it would load with a random one."""
    base = write(tmp_path / "base", "equal", tie=False)
    experts = [write(tmp_path / name, None, seed=k) for k, name in enumerate("ab", 1)]
    found = merged(tmp_path)
    assert not ties(tmp_path)
    delta = sum(0.5 * (e[EMBEDDING] - base[EMBEDDING]) for e in experts)
    for name in (HEAD, EMBEDDING):
        assert torch.allclose(found[name], base[EMBEDDING] + delta, atol=1e-6), name


def test_a_copy_of_another_precision_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        tensors = write(tmp_path / name, None, seed=seed)
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    assert set(merged(tmp_path)) == {EMBEDDING, HEAD, NORM}


def test_sweeps(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, "other" if name == "a" else None, seed=seed)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in "ab"]
    config = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models}
    mf.sweep_checkpoints(config, tmp_path / "out", {"density": [0.5, 1.0]})
    folders = [path.parent for path in (tmp_path / "out").rglob("model.safetensors")]
    assert len(folders) == 2
    for folder in folders:
        assert HEAD in load_file(folder / "model.safetensors")
        assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]

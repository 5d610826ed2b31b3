"""Models whose weights mean other things are told, though their tensors have the same shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import magic_fast as mf

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def write(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    save_file({"model.norm.weight": torch.randn(32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def warnings(folder: Path, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
    document = {
        "merge_method": "task_arithmetic",
        "base_model": write(folder / "base", base),
        "models": [{"model": write(folder / "expert", expert), "parameters": {"weight": 1.0}}],
    }
    plan = mf.plan_checkpoints(document, folder / "out")
    return [text for text in plan.warnings if "config.json" in text]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 5e5}, "rope_theta (500000.0, there 10000.0)"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
         "rope_theta (500000.0, there 10000.0)"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type ('linear', there None)"),
        ({"hidden_act": "gelu"}, "hidden_act ('gelu', there 'silu')"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps (1e-06, there 1e-05)"),
        ({"sliding_window": 8}, "sliding_window (8, there 4096)"),
        ({"model_type": "mistral"}, "model_type ('mistral', there 'llama')"),
    ],
)  # fmt: skip
def test_what_differs_is_said(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = {**LLAMA, "rope_theta": 10000.0, "sliding_window": 4096}
    (text,) = warnings(tmp_path, base, {**base, **change})
    assert said in text and str(tmp_path / "expert") in text and str(tmp_path / "base") in text


@pytest.mark.parametrize(
    "change",
    [
        {"torch_dtype": "bfloat16", "use_cache": False, "_name_or_path": "x"},
        {"eos_token_id": 3, "max_position_embeddings": 128, "vocab_size": 40},
        {"head_dim": 8, "num_key_value_heads": 4},  # what the default comes to
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},  # as release 5 writes it
        {"rope_scaling": None, "sliding_window": None},
        {"attention_dropout": 0.1, "initializer_range": 0.5},
    ],
)
def test_what_means_the_same_is_not(change: dict[str, Any], tmp_path: Path) -> None:
    base = {**LLAMA, "rope_theta": 10000.0, "sliding_window": 4096}
    assert warnings(tmp_path, base, {**base, **change}) == []


def test_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    parts = [{"model_type": "llava", "text_config": {**LLAMA, "rms_norm_eps": e}} for e in (1, 2)]
    (text,) = warnings(tmp_path, *parts)
    assert "rms_norm_eps (2, there 1)" in text


def test_other_heads_are_refused(tmp_path: Path) -> None:
    other = {**LLAMA, "num_attention_heads": 2, "head_dim": 16}
    said = r"attention heads of .*expert: expected 4 of 8 as in .*base, got 2 of 16"
    with pytest.raises(mf.CheckpointError, match=said):
        warnings(tmp_path, LLAMA, other)

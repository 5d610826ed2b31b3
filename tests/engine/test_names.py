"""Files of one model in other names meet by the names of transformers' module tree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf

BERT = {
    "embeddings.word_embeddings.weight": (12, 8),
    "encoder.layer.0.attention.self.query.weight": (8, 8),
    "encoder.layer.1.output.dense.bias": (8,),
}
GPT2 = {
    "wte.weight": (12, 8),
    "h.0.attn.c_attn.weight": (8, 24),
    "h.1.mlp.c_proj.weight": (32, 8),
    "ln_f.weight": (8,),
}
LLAMA = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "lm_head.weight": (12, 8),
}
LLAVA = {
    "language_model.model.embed_tokens.weight": (12, 8),
    "language_model.model.layers.0.mlp.up_proj.weight": (16, 8),
    "language_model.lm_head.weight": (12, 8),
    "multi_modal_projector.linear_1.weight": (8, 8),
}
NESTED = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def nested(name: str) -> str:
    """LLaVA's names since transformers 4.52."""
    for old, new in NESTED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


Shapes = dict[str, tuple[int, ...]]
CASES: dict[str, tuple[str, str, Shapes, Callable[[str], str]]] = {
    "bert": ("bert", "BertModel", BERT, lambda name: f"bert.{name}"),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2, lambda name: f"transformer.{name}"),
    "llava": ("llava", "LlavaForConditionalGeneration", LLAVA, nested),
    **{
        prefix: ("llama", "LlamaForCausalLM", LLAMA, lambda name, p=prefix: p + name)
        for prefix in ("module.", "_orig_mod.", "_forward_module.", "module._orig_mod.")
    },
    "unknown": ("nobody_knows_it", "Own", LLAMA, lambda name: f"module.{name}"),
}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("calibrate", [None, "sphere"])
@pytest.mark.parametrize("turned", [False, True], ids=["base", "expert"])
@pytest.mark.parametrize("case", CASES)
def test_other_names(case: str, turned: bool, calibrate: str | None, tmp_path: Path) -> None:
    """The result has the names of the base and the values of the merge by hand."""
    model_type, architecture, shapes, rename = CASES[case]
    config = {"model_type": model_type, "architectures": [architecture]}
    config |= {"tie_word_embeddings": False, "vocab_size": 12}
    torch.manual_seed(0)
    models: list[dict[str, Tensor]] = [
        {name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)
    ]
    paths = []
    for number, tensors in enumerate(models):
        other = (number == 0) == turned
        named = {rename(name) if other else name: x for name, x in tensors.items()}
        paths.append(write(tmp_path / str(number), named, config))
    document = {
        "merge_method": "task_arithmetic",
        "base_model": paths[0],
        "models": [{"model": path, "parameters": {"weight": 0.5}} for path in paths[1:]],
    }
    report = mf.merge_checkpoints(document, tmp_path / "out", calibrate=calibrate)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {rename(n) if turned else n for n in shapes}
    assert len(report.tensors) == len(shapes)
    base, *experts = models
    for name in shapes:
        delta = sum(0.5 * (e[name] - base[name]) for e in experts)
        got = found[rename(name) if turned else name] - base[name]
        if calibrate is None:
            assert torch.allclose(got, torch.as_tensor(delta), atol=1e-6), name
        else:  # in the same direction
            angle = torch.nn.functional.cosine_similarity
            assert float(angle(got.flatten(), torch.as_tensor(delta).flatten(), dim=0)) > 0.9


def test_another_layout_is_said_to_be_one(tmp_path: Path) -> None:
    single = {
        f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight": torch.randn(4, 4)
        for e in range(2)
        for w in (1, 2, 3)
    }
    stacked = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 8, 4),
        "model.layers.0.mlp.experts.down_proj": torch.randn(2, 4, 4),
    }
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    paths = [write(tmp_path / str(k), x, config) for k, x in enumerate((single, stacked))]
    document = {
        "merge_method": "task_arithmetic",
        "base_model": paths[0],
        "models": [{"model": paths[1], "parameters": {"weight": 0.5}}],
    }
    said = r"layout of .*1: expected model.layers.0.block_sparse_moe.experts.0.w1.weight as in"
    with pytest.raises(mf.CheckpointError, match=said):
        mf.merge_checkpoints(document, tmp_path / "out")
    assert not (tmp_path / "out").exists()

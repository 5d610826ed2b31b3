"""What mergekit's tests import from a ``tests/common.py`` that its source distribution leaves out,
written anew from how they use it. Put in its place by suite_plugin.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

_TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _saved(config: PretrainedConfig, path: Any, kind: Any = None) -> str:
    """A model with random weights in float32: some architectures start in bfloat16, in which the
    tests' bounds do not hold."""
    model = AutoModelForCausalLM.from_config(config) if kind is None else kind(config)
    model.to(torch.float32).save_pretrained(path, safe_serialization=True)
    return str(path)


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    return _saved(LlamaConfig(vocab_size=vocab_size, **_TINY), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    return _saved(GraniteConfig(vocab_size=vocab_size, **_TINY), path)


def make_gpt2size(path: Any, vocab_size: int = 64) -> str:
    """Twelve layers, as the smallest GPT-2 has."""
    return _saved(GPT2Config(vocab_size=vocab_size, n_embd=24, n_head=2, n_positions=32), path)


def make_picoLlaVa(path: Any) -> str:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=64, **_TINY)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return _saved(config, path, LlavaForConditionalGeneration)


def _tensors(folder: str | Path) -> dict[str, Tensor]:
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def run_and_check_merge(
    config: MergeConfiguration,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Runs the merge. The output has tensors, none with NaN, and passes ``validate``.

    ``auto_arch`` marks architectures whose tensors mergekit finds by itself; it may name them anew,
    so nothing more can be asked of them here.
    """
    with tempfile.TemporaryDirectory() as out:
        run_merge(config, out_path=out, options=MergeOptions(quiet=True))
        merged = _tensors(out)
        assert merged, f"no tensors in {out}"
        assert not [name for name, tensor in merged.items() if tensor.isnan().any()]
        if validate is not None:
            validate(out)

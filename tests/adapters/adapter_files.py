"""Adapters written as PEFT, kohya and diffusers write them, and their dense sums in float64."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

#: module → shape of its weight; embeddings are those called so
MODULES: dict[str, tuple[int, ...]] = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 40),
    "model.layers.1.self_attn.q_proj": (24, 16),
}


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2].startswith("emb")


@dataclass
class Lora:
    """One adapter in memory: module → (A, B), with the settings of its configuration."""

    factors: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]

    def scaling(self, module: str) -> float:
        """By PEFT's rules, written down once more."""
        alpha = self.config["lora_alpha"]
        for pattern, value in self.config.get("alpha_pattern", {}).items():
            if module == pattern or module.endswith("." + pattern):
                alpha = value
        rank = self.factors[module][0].shape[0]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def delta(self, module: str, shape: Sequence[int]) -> Tensor:
        """s·B·A in float64, in the shape of the weight; zero where the module is not adapted."""
        if module not in self.factors:
            return torch.zeros(tuple(shape), dtype=torch.float64)
        a, b = (x.double() for x in self.factors[module])
        product = self.scaling(module) * b.flatten(1) @ a.flatten(1)
        return product.T if is_embedding(module) else product.reshape(tuple(shape))


def draw_lora(
    seed: int,
    modules: Mapping[str, tuple[int, ...]] = MODULES,
    *,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] | None = None,
    **config: Any,
) -> Lora:
    """A LoRA with normal factors, the same for a seed and a name."""
    factors = {}
    for module, shape in modules.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {module}".encode()))
        r = (ranks or {}).get(module, rank)
        out, into = (shape[1], (shape[0],)) if is_embedding(module) else (shape[0], shape[1:])
        a = torch.randn(r, *into, generator=generator) / 8
        b = torch.randn(out, r, *[1] * (len(into) - 1), generator=generator) / 8
        factors[module] = (a.to(dtype), b.to(dtype))
    settings = {"r": rank, "lora_alpha": 2 * rank, "use_rslora": False} | config
    return Lora(factors, settings)


def write_peft(folder: Path, lora: Lora, **config: Any) -> Path:
    """The folder that PEFT's save_pretrained writes."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in lora.factors.items():
        stem = f"base_model.model.{module}."
        if is_embedding(module):
            tensors |= {stem + "lora_embedding_A": a, stem + "lora_embedding_B": b}
        else:
            tensors |= {stem + "lora_A.weight": a, stem + "lora_B.weight": b}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "target_modules": sorted({m.rpartition(".")[2] for m in lora.factors}),
        "fan_in_fan_out": False,
        "bias": "none",
        "use_dora": False,
        "task_type": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | lora.config | config))
    return folder


def write_ia3(folder: Path, vectors: Mapping[str, Tensor], **config: Any) -> Path:
    """An IA3 adapter of PEFT: module → [out, 1] or [1, in]."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{m}.ia3_l": v for m, v in vectors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "IA3",
        "base_model_name_or_path": "base",
        "target_modules": sorted({m.rpartition(".")[2] for m in vectors}),
        "feedforward_modules": sorted(
            {m.rpartition(".")[2] for m, v in vectors.items() if v.shape[0] == 1}
        ),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder

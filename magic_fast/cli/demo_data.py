"""Checkpoints to try a merge on: Llama layout, sharded bfloat16, written shard by shard.

An expert is the base plus a task vector with the traits of a real one: heavy-tailed (Student-t,
4 degrees of freedom), part-sparse (a share of the entries does not move at all), of a size that
grows with depth, and in part common to all experts, by a share that differs from layer to layer.
Each tensor has its own generator, seeded by its name: no order, thread or shard changes its bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

_Float = npt.NDArray[np.float32]

BASE_STD = 0.02  # of the base's matrices, as Llama initialises them
TASK_STD = 4e-4  # scale of the task vectors, before rounding to bfloat16
MOVED_SHARE = 0.7  # of the entries have moved
STAMP = "checkpoints.json"


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of the architecture; ``shard_bytes`` is the largest shard."""

    hidden: int
    layers: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    shard_bytes: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which they are written."""
        hidden, ffn = self.hidden, self.ffn
        kv = hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.mlp.gate_proj.weight", (ffn, hidden)
            yield f"{layer}.mlp.up_proj.weight", (ffn, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, ffn)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in self.tensors())


TINY = LlamaShape(
    hidden=64, layers=2, ffn=172, vocab=512, heads=4, kv_heads=2, shard_bytes=128 * 1024
)
SMALL = LlamaShape(
    hidden=768, layers=14, ffn=2048, vocab=32000, heads=12, kv_heads=12, shard_bytes=100 * 10**6
)
SIZES = {"tiny": TINY, "small": SMALL}


def write_checkpoints(
    folder: Path, shape: LlamaShape, num_experts: int = 3, seed: int = 0
) -> list[Path]:
    """Writes ``folder/base`` and ``folder/expert-0`` …, unless the same ones are there already.

    Returns:
        The model folders, the base first.
    """
    models = [folder / "base", *(folder / f"expert-{k}" for k in range(num_experts))]
    made_of = {"shape": asdict(shape), "num_experts": num_experts, "seed": seed, "version": 1}
    stamp = folder / STAMP
    if stamp.is_file() and json.loads(stamp.read_text()) == made_of:
        return models

    from safetensors.torch import save_file

    stamp.unlink(missing_ok=True)  # written last: what lacks it is not whole
    shards = _shards(shape)
    for model in models:
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir(parents=True)
        _write_small_files(model, shape, shards)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for file, tensors in shards.items():
            make = partial(_tensor, layers=shape.layers, num_experts=num_experts, seed=seed)
            columns = list(pool.map(make, *zip(*tensors, strict=True)))
            for m, model in enumerate(models):
                state = {n: made[m] for (n, _), made in zip(tensors, columns, strict=True)}
                save_file(state, model / file, {"format": "pt"})
    stamp.write_text(json.dumps(made_of, indent=2))
    return models


def _shards(shape: LlamaShape) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in shape.tensors():
        num_bytes = 2 * int(np.prod(size))
        if parts[-1] and filled + num_bytes > shape.shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append((name, size))
        filled += num_bytes
    return {
        f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)
    }


def _generator(seed: int, who: str, name: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{who}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def _student_t4(size: tuple[int, ...], generator: np.random.Generator) -> _Float:
    """Normal ÷ √(χ²₄ / 4), the χ²₄ as −2·ln of a product of two uniforms."""
    uniforms = generator.random(size, dtype=np.float32)
    uniforms *= generator.random(size, dtype=np.float32)
    np.clip(uniforms, 2.0**-48, 1 - 2.0**-24, out=uniforms)
    np.log(uniforms, out=uniforms)
    uniforms *= -0.5
    np.sqrt(uniforms, out=uniforms)
    normal = generator.standard_normal(size, dtype=np.float32)
    normal /= uniforms
    return normal


def _tensor(
    name: str, size: tuple[int, ...], *, layers: int, num_experts: int, seed: int
) -> list[torch.Tensor]:
    """One tensor of the base and of every expert, in bfloat16."""
    base = _generator(seed, "base", name).standard_normal(size, dtype=np.float32)
    if len(size) == 1:
        base = 1 + np.float32(0.05) * base
    else:
        base *= np.float32(BASE_STD)
    result = [torch.from_numpy(base).bfloat16()]
    base = result[0].float().numpy()
    depth, common_share = _traits(name, layers, seed)
    std = TASK_STD * (0.5 + depth) * (20 if len(size) == 1 else 1)
    common = _student_t4(size, _generator(seed, "common", name))
    common *= np.float32(std * common_share**0.5)
    for k in range(num_experts):
        generator = _generator(seed, f"expert-{k}", name)
        task = _student_t4(size, generator)
        task *= np.float32(std * (1 - common_share) ** 0.5)
        task += common
        task *= generator.random(size, dtype=np.float32) < MOVED_SHARE
        task += base
        result.append(torch.from_numpy(task).bfloat16())
    return result


def _traits(name: str, layers: int, seed: int) -> tuple[float, float]:
    """Relative depth of a tensor in [0, 1], and the share of its task vectors that is common."""
    parts = name.split(".")
    depth = int(parts[2]) / max(1, layers - 1) if parts[1] == "layers" else 0.5
    return depth, 0.5 * float(_generator(seed, "traits", name).random())


def _write_small_files(
    model: Path, shape: LlamaShape, shards: dict[str, list[tuple[str, tuple[int, ...]]]]
) -> None:
    weight_map = {name: file for file, tensors in shards.items() for name, _ in tensors}
    specials, plain = ["<unk>", "<s>", "</s>"], ("single_word", "lstrip", "rstrip", "normalized")
    vocab = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(29))])}
    files: dict[str, object] = {
        "model.safetensors.index.json": {
            "metadata": {"total_size": 2 * shape.parameters},
            "weight_map": weight_map,
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": word, **dict.fromkeys(plain, False), "special": True}
                for i, word in enumerate(specials)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 2048,
        },
    }
    for file, content in files.items():
        (model / file).write_text(json.dumps(content, indent=2) + "\n")

"""Inputs with the same bits everywhere: SHAKE-256 of a word, as integers, as exact floats."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
State = dict[str, Tensor]

DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
}
#: word → dtypes of base and experts, which go round over the tensors of each
MIXES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    **{word: ((word,),) for word in DTYPES},
    "mixed": (("bf16",), ("f32", "bf16"), ("f16",), ("bf16", "f16", "f32")),
}

#: Convolutions, a scalar, an empty tensor, vectors.
SHAPES: Shapes = {
    "model.embed_tokens.weight": (20, 12),
    "model.layers.0.mlp.up_proj.weight": (9, 34),
    "model.layers.0.input_layernorm.weight": (17,),
    "model.layers.0.temperature": (),
    "model.layers.0.empty.weight": (0, 8),
    "model.layers.1.mlp.down_proj.weight": (34, 9),
    "model.layers.1.conv.weight": (6, 3, 3, 3),
    "model.layers.1.mlp.conv1d.weight": (2, 5, 21),
    "model.norm.weight": (12,),
}
#: More than one block of sums (65 536 elements) and of memory, of lengths that nothing divides.
LARGE: Shapes = {
    "model.embed_tokens.weight": (64, 40),
    "model.layers.0.mlp.up_proj.weight": (301, 501),
    "model.layers.0.input_layernorm.weight": (77,),
    "model.layers.1.mlp.down_proj.weight": (64, 128),
    "model.layers.1.long.bias": (90_003,),
    "model.layers.1.mlp.conv1d.weight": (5, 11, 101),
    "lm_head.weight": (64, 40),
}
#: What the GPUs' kernels get, which run here a thread at a time.
FEW: Shapes = {n: s for n, s in SHAPES.items() if "layers.0" in n and "empty" not in n}


def sized(shapes: Shapes, backend: str | None) -> Shapes:
    """The shapes, or fewer where a backend is slow."""
    if backend in ("cuda", "triton"):
        return FEW
    return SHAPES if shapes is LARGE and backend == "torch" else shapes


def integers(word: str, count: int) -> Tensor:
    """``count`` sums of four 16-bit numbers: bell-shaped, of deviation 0.58·2^16."""
    if not count:
        return torch.zeros(0, dtype=torch.int64)
    data = bytearray(hashlib.shake_256(word.encode()).digest(8 * count))
    return torch.frombuffer(data, dtype=torch.int16).view(count, 4).long().sum(1)


def draw(word: str, shape: Sequence[int], size: float = 1.0) -> Tensor:
    """float64 numbers of deviation 0.58·size."""
    return (integers(word, math.prod(shape)).double() / 2**16 * size).view(tuple(shape))


@cache
def change(word: str, shape: tuple[int, ...]) -> Tensor:
    """A task vector, float64: a quarter of it zero, half of it on a coarse grid, so that many
    magnitudes are equal and a trim has to cut through them. Read only: many cases share it."""
    found = draw(word, shape, 0.05)
    coarse = (found * 256).round() / 256
    kind = (integers(word + " kind", found.numel()) & 3).view(found.shape)
    return torch.where(kind < 2, coarse, found) * (kind != 0)


@cache
def _start(name: str, shape: tuple[int, ...]) -> Tensor:
    return draw(f"base {name}", shape)


def models(shapes: Shapes = SHAPES, mix: str = "f32", experts: int = 3) -> list[State]:
    """A base and its experts, with one tensor of integers."""
    turns = MIXES[mix]
    found: list[State] = []
    for k in range(experts + 1):
        dtypes, state = turns[k % len(turns)], {}
        for number, (name, shape) in enumerate(shapes.items()):
            x = _start(name, shape)
            if k:
                x = x.to(DTYPES[turns[0][number % len(turns[0])]]).double()
                x = x + change(f"expert {k} {name}", shape)
            state[name] = x.to(DTYPES[dtypes[number % len(dtypes)]], copy=True)
        found.append(state | {"model.layers.0.position_ids": torch.arange(9)})
    return found


def uneven(states: list[State]) -> list[State]:
    """The models with rows that moved by very different amounts, the first not at all."""
    base = states[0]
    for k, state in enumerate(states[1:]):
        for name, x in state.items():
            if x.is_floating_point() and x.dim() and x.numel():
                start = base[name].double()
                sizes = [0.0 if r == 0 else ((r + k) % 5) ** 2 / 4 for r in range(len(x))]
                factor = torch.tensor(sizes, dtype=torch.float64).view(-1, *[1] * (x.dim() - 1))
                state[name] = (start + (x.double() - start) * factor).to(x.dtype)
    return states


def task_vectors(shapes: Shapes = SHAPES, mix: str = "f32", experts: int = 3) -> list[State]:
    dtypes = MIXES[mix]
    return [
        {
            n: change(f"expert {k} {n}", s).to(DTYPES[dtypes[k % len(dtypes)][0]])
            for n, s in shapes.items()
        }
        for k in range(experts)
    ]


def write_models(states: Sequence[State], **config: Any) -> None:
    """``base`` and ``expert-K`` in the current folder."""
    for k, state in enumerate(states):
        folder = Path(f"expert-{k - 1}" if k else "base")
        folder.mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors")
        settings = {"model_type": "llama", "num_hidden_layers": 2, **config}
        (folder / "config.json").write_text(json.dumps(settings))


class Network(nn.Module):
    """Tied embedding and head, a convolution, a norm with float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(x + torch.tanh(self.hidden(self.norm(x))))


def networks(experts: int = 3) -> list[Network]:
    """A base and its experts, in evaluation mode."""
    found = []
    for k in range(experts + 1):
        network = Network().eval()
        with torch.no_grad():
            for name, p in network.named_parameters():
                x = draw(f"network {name}", p.shape, 0.5)
                p.copy_(x if not k else x + change(f"network {k} {name}", p.shape))
            for name, b in network.named_buffers():
                if b.is_floating_point():
                    b.copy_(1 + draw(f"network {k} {name}", b.shape, 0.2).abs())
        found.append(network)
    return found


def samples(tasks: Sequence[str], batches: int = 2) -> dict[str, list[Tensor]]:
    return {t: [draw(f"{t} {i}", (4, 3, 6, 6)).float() for i in range(batches)] for t in tasks}


#: module → shape of its weight
ADAPTED: Shapes = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 40),
    "model.layers.1.self_attn.q_proj": (24, 16),
}


def write_loras(count: int = 3, rank: int | None = None) -> list[str]:
    """``lora-K`` in the current folder, as PEFT saves them; without ``rank`` theirs differ."""
    found = []
    for k in range(count):
        r = 2 + k if rank is None else rank
        tensors = {
            f"base_model.model.{m}.lora_{word}.weight": draw(f"{k} {m} {word}", s, 0.2).float()
            for m, (out, into) in ADAPTED.items()
            for word, s in (("A", (r, into)), ("B", (out, r)))
        }
        config = {
            "peft_type": "LORA", "base_model_name_or_path": "base", "r": r,
            "lora_alpha": 2 * r + k, "use_rslora": k == 1, "fan_in_fan_out": False,
            "target_modules": ["down_proj", "q_proj"], "bias": "none",
        }  # fmt: skip
        found.append(_write_adapter(f"lora-{k}", tensors, config))
    return found


def write_ia3(count: int = 2) -> list[str]:
    """``ia3-K`` in the current folder; the vectors of ``down_proj`` scale its inputs."""
    found = []
    for k in range(count):
        tensors = {
            f"base_model.model.{m}.ia3_l": (1 + draw(f"{k} {m}", s, 0.1)).float()
            for m, (out, into) in ADAPTED.items()
            for s in [(1, into) if "down" in m else (out, 1)]
        }
        config = {
            "peft_type": "IA3", "base_model_name_or_path": "base",
            "target_modules": ["down_proj", "q_proj"], "feedforward_modules": ["down_proj"],
        }  # fmt: skip
        found.append(_write_adapter(f"ia3-{k}", tensors, config))
    return found


def _write_adapter(name: str, tensors: State, config: Mapping[str, Any]) -> str:
    Path(name).mkdir()
    save_file(tensors, Path(name) / "adapter_model.safetensors")
    (Path(name) / "adapter_config.json").write_text(json.dumps(config))
    return name


def write_tokenizers(words: Mapping[str, str]) -> Iterator[str]:
    """One model folder for each name, with a row for each of its words."""
    for name, text in words.items():
        tokens = text.split()
        folder = Path(name)
        folder.mkdir()
        state = {
            "model.embed_tokens.weight": draw(f"tokens {name}", (len(tokens), 6)).float(),
            "model.norm.weight": draw(f"norm {name}", (6,)).float(),
        }
        save_file(state, folder / "model.safetensors")
        sizes = {"tie_word_embeddings": True, "vocab_size": len(tokens), "hidden_size": 6}
        (folder / "config.json").write_text(json.dumps(sizes))
        special = {"id": 0, "content": tokens[0], "special": True, "normalized": False}
        vocab = {token: row for row, token in enumerate(tokens)}
        data = {"added_tokens": [special], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
        (folder / "tokenizer.json").write_text(json.dumps(data))
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        yield name

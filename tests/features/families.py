"""Tiny randomly initialised models of many architectures, with a base, experts, a merged model and
samples for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

TASKS = ("first", "second")


@dataclass
class Case:
    base: nn.Module
    experts: list[nn.Module]
    merged: nn.Module
    data: dict[str, list[Any]]


def _ids(generator: torch.Generator, vocab: int = 31, length: int = 7) -> Tensor:
    return torch.randint(3, vocab, (3, length), generator=generator)


def _text(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0  # padding
    return {"input_ids": ids, "attention_mask": mask}


def _images(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}


def _pair(generator: torch.Generator) -> dict[str, Tensor]:
    return {**_text(generator), "decoder_input_ids": _ids(generator, length=4)}


def _both(generator: torch.Generator) -> dict[str, Tensor]:
    return {**_text(generator), **_images(generator)}


_SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_GQA = {**_SIZES, "num_key_value_heads": 1}
_IMAGE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def _clip() -> nn.Module:
    text = {**_SIZES, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=_IMAGE, projection_dim=8))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Any]]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA)), _text),
    "llama_tied": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA, tie_word_embeddings=True)),
        _text,
    ),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GQA, head_dim=8)), _text),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GQA)), _text),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GQA, head_dim=8)), _text),
    "gemma": (lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GQA, head_dim=8)), _text),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GQA, head_dim=8)), _text),
    "gemma3": (
        lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**_GQA, head_dim=8, sliding_window=4)
        ),
        _text,
    ),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        ),
        _text,
    ),
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SIZES)), _text),
    "roberta": (
        lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_SIZES | {"max_position_embeddings": 40})),
        _text,
    ),
    "albert": (
        lambda: tf.AlbertModel(tf.AlbertConfig(**_SIZES, embedding_size=8)),
        _text,
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        _pair,
    ),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**_IMAGE)), _images),
    "clip": (_clip, _both),
}  # fmt: skip


def moved(model: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """A copy whose floating parameters moved at random; tied ones stay tied."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return other


def average(experts: list[nn.Module]) -> nn.Module:
    merged = copy.deepcopy(experts[0])
    rows = [dict(e.named_parameters()) for e in experts]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(sum(row[name] for row in rows) / len(rows))
    return merged


def case(family: str, batches: int = 2) -> Case:
    make, samples = FAMILIES[family]
    return case_of(make, samples, batches)


def case_of(
    make: Callable[[], nn.Module], samples: Callable[[torch.Generator], Any], batches: int = 2
) -> Case:
    torch.manual_seed(0)
    base = make().eval()
    experts = [moved(base, seed) for seed in (1, 2)]
    generator = torch.Generator().manual_seed(3)
    data = {task: [samples(generator) for _ in range(batches)] for task in TASKS}
    return Case(base, experts, average(experts), data)


def tensors_of(output: Any) -> list[Tensor]:
    """All floating tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output
    if isinstance(values, str | int | float | None) or not hasattr(values, "__iter__"):
        return []
    return [t for value in values for t in tensors_of(value)]


def run(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(batch, dict):
            return tensors_of(model(**batch))
        return tensors_of(model(*batch) if isinstance(batch, tuple) else model(batch))

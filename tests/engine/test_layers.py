"""Layers in a new order: transformers loads the result, and each layer is the one that it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf

tf = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
#: (class, class of the configuration, fields, fields left out of config.json, its new ones)
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8, "sliding_window": 4}, ()),
    "gemma2, by number": (
        "Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8, "sliding_window": 4},
        ("layer_types",),
    ),
    "qwen2": (
        "Qwen2ForCausalLM", "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        ("layer_types",),
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"no_rope_layer_interval": 2},
                ("no_rope_layers", "layer_types")),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig",
                  {"head_dim": 8, "decoder_sparse_step": 2, **MOE}, ()),
}  # fmt: skip


@pytest.mark.parametrize("order", [[0, 1, 2, 1, 2, 3], [0, 2, 1, 3], [3, 0]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_each_layer_is_the_one_that_it_was(case: str, order: list[int], tmp_path: Path) -> None:
    architecture, config_class, fields, left_out = CASES[case]
    torch.manual_seed(0)
    kind = getattr(tf, architecture)
    model = kind(getattr(tf, config_class)(**SMALL, **fields)).float().eval()
    model.save_pretrained(tmp_path / "m")
    stated = json.loads((tmp_path / "m" / "config.json").read_text())
    for key in left_out:
        stated.pop(key, None)
    (tmp_path / "m" / "config.json").write_text(json.dumps(stated))
    pieces = [{"sources": [{"model": str(tmp_path / "m"), "layer_range": [i, i + 1]}]}
              for i in order]  # fmt: skip
    mf.merge_checkpoints({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    found, info = kind.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    parameters = dict(model.named_parameters())
    for name, x in found.named_parameters():
        source = re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{order[int(m[1])]}.", name)
        assert torch.equal(x, parameters[source]), name
    # the very modules of the model in the new order
    layers = [model.model.layers[i] for i in order]
    ids = torch.arange(3, 19)[None]
    got = found.eval()(input_ids=ids, use_cache=False).logits
    listed = ("layer_types", "no_rope_layers")
    for key in listed:
        if getattr(model.config, key, None):
            wanted = [getattr(model.config, key)[i] for i in order]
            assert getattr(found.config, key) == wanted
            setattr(model.config, key, wanted)
    model.config.num_hidden_layers = len(order)
    model.model.layers = torch.nn.ModuleList(layers)
    assert torch.allclose(got, model(input_ids=ids, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize(("architecture", "config_class", "fields", "stack"), [
    ("BartForCausalLM", "BartConfig",
     {"d_model": 16, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 2,
      "decoder_ffn_dim": 24}, "model.decoder.layers"),
    ("GPTNeoForCausalLM", "GPTNeoConfig",
     {"num_hidden_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
      "window_size": 4}, "transformer.h"),
])  # fmt: skip
def test_fields_that_single_architectures_read(
    architecture: str, config_class: str, fields: dict[str, Any], stack: str, tmp_path: Path
) -> None:
    """BART counts the layers of its decoder by a field of its own; GPT-Neo reads the kinds of its
    layers from a list of periods."""
    order = [1, 0, 1]
    kind = getattr(tf, architecture)
    model = kind(getattr(tf, config_class)(**SMALL | fields)).eval()
    model.save_pretrained(tmp_path / "m")
    pieces = [{"sources": [{"model": str(tmp_path / "m"), "layer_range": [i, i + 1]}]}
              for i in order]  # fmt: skip
    mf.merge_checkpoints({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    found, info = kind.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    layers, own = found.get_submodule(stack), model.get_submodule(stack)
    assert len(layers) == len(order)
    for layer, number in zip(layers, order, strict=True):
        for (name, x), y in zip(layer.named_parameters(), own[number].parameters(), strict=True):
            assert torch.equal(x, y), name
    if architecture == "GPTNeoForCausalLM":
        assert [layer.attn.attention_type for layer in layers] == ["local", "global", "local"]


def test_dense_layers_apart_are_refused(tmp_path: Path) -> None:
    """DeepSeek-V3's configuration only counts them."""
    config = {**SMALL, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
              "first_k_dense_replace": 2}  # fmt: skip
    from safetensors.torch import save_file

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(4)]
    save_file({name: torch.randn(16) for name in names}, tmp_path / "m" / "model.safetensors")
    pieces = [{"sources": [{"model": str(tmp_path / "m"), "layer_range": r}]}
              for r in ([0, 3], [1, 4])]  # fmt: skip
    with pytest.raises(mf.ConfigError, match="first_k_dense_replace for the new order of layers"):
        mf.merge_checkpoints({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_language_model_of_a_vlm_as_deep_as_its_vision_tower(tmp_path: Path) -> None:
    """The configuration counts both stacks; layer_range is of the language model."""
    from safetensors.torch import load_file, save_file

    text = {**SMALL, "model_type": "llama", "num_hidden_layers": 3}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "hidden_size": 16}
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
              "text_config": text, "vision_config": vision}  # fmt: skip
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    prefixes = "language_model.model.layers", "vision_tower.vision_model.encoder.layers"
    tensors = {
        f"{prefix}.{i}.{rest}.weight": torch.randn(16)
        for prefix, rest in zip(prefixes, ("input_layernorm", "layer_norm1"), strict=True)
        for i in range(3)
    }
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    pieces = [{"sources": [{"model": str(tmp_path / "m"), "layer_range": r}]}
              for r in ([0, 2], [1, 3])]  # fmt: skip
    mf.merge_checkpoints({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(found) == 4 + 3
    for i, source in enumerate([0, 1, 1, 2]):
        name = "language_model.model.layers.{}.input_layernorm.weight"
        assert torch.equal(found[name.format(i)], tensors[name.format(source)])
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated["text_config"]["num_hidden_layers"] == 4
    assert stated["vision_config"]["num_hidden_layers"] == 3

"""Names of published files, of older and newer releases, of experts stacked or single: each is the
parameter that it is in the module tree."""

from __future__ import annotations

from typing import Any

import pytest

from magic_fast.errors import InputError
from magic_fast.models import Block, Kind, Role, Step, roles_of

VLM = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
WIDTH = {"text_config": {"hidden_size": 8}, "vision_config": {}}


def role(model_type: str, name: str, *shape: int, **config: Any) -> Role:
    return roles_of({"model_type": model_type, **config}, {name: (shape, "BF16")})[name]


SAME = [
    # model type, names in files, name in the module tree
    ("bert", ["bert.encoder.layer.1.output.dense.weight", "encoder.layer.1.output.dense.weight"],
     "bert.encoder.layer.1.output.dense.weight"),
    ("gpt2", ["transformer.h.2.mlp.c_fc.weight", "h.2.mlp.c_fc.weight"],
     "transformer.h.2.mlp.c_fc.weight"),
    ("t5", ["encoder.block.0.layer.1.DenseReluDense.wo.weight",
            "transformer.encoder.block.0.layer.1.DenseReluDense.wo.weight"],
     "encoder.block.0.layer.1.DenseReluDense.wo.weight"),
    ("llama", ["model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight",
               "transformer.layers.0.mlp.up_proj.weight",  # for answers to questions
               "_orig_mod.model.layers.0.mlp.up_proj.weight",
               "module.model.layers.0.mlp.up_proj.weight"],
     "model.layers.0.mlp.up_proj.weight"),
    ("llava", ["language_model.model.layers.3.mlp.up_proj.weight",
               "model.language_model.layers.3.mlp.up_proj.weight",
               "model.language_model.model.layers.3.mlp.up_proj.weight",
               "language_model.layers.3.mlp.up_proj.weight"],
     "model.language_model.layers.3.mlp.up_proj.weight"),
    ("llava", ["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
               "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
               "model.vision_tower.encoder.layers.0.mlp.fc1.weight"],
     "model.vision_tower.encoder.layers.0.mlp.fc1.weight"),
    ("qwen2_5_vl", ["model.layers.0.mlp.up_proj.weight",
                    "model.language_model.layers.0.mlp.up_proj.weight"],
     "model.language_model.layers.0.mlp.up_proj.weight"),
    ("qwen2_5_vl", ["visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"],
     "model.visual.blocks.0.attn.qkv.weight"),
    ("nemotron_h", ["backbone.layers.0.mixer.in_proj.weight",
                    "model.layers.0.mixer.in_proj.weight"],
     "model.layers.0.mixer.in_proj.weight"),
    # a backbone, which is a class of another type that is not its base model
    ("upernet", ["backbone.encoder.stages.0.layers.1.layer.0.convolution.weight"],
     "backbone.encoder.stages.0.layers.1.layer.0.convolution.weight"),
    # renamings that leave the prefix of the base model before a tensor of the head
    ("rf_detr", ["segmentation_head.query_features_proj.weight", "query_features_proj.weight"],
     "query_features_proj.weight"),
    ("gpt_neox", ["embed_out.weight", "lm_head.weight"], "lm_head.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "names", "canonical"), SAME)
def test_names_of_one_parameter(model_type: str, names: list[str], canonical: str) -> None:
    config = VLM if model_type == "llava" else {}
    for name in names:
        shape = (8, 8, 3, 3) if "convolution" in name else (8, 8)
        found = role(model_type, name, *shape, **config)
        assert (found.canonical, found.targets) == (canonical, (canonical,)), name
        assert found.owner, name
        assert found.layout == ()


def test_old_names_of_norms() -> None:
    found = role("bert", "bert.embeddings.LayerNorm.gamma", 8)
    assert (found.kind, found.canonical) == (Kind.NORM, "bert.embeddings.LayerNorm.weight")


@pytest.mark.parametrize(
    ("name", "piece"), [("gate_proj", 0), ("up_proj", 1)], ids=lambda value: str(value)
)
def test_a_single_expert_is_a_piece_of_the_stack(name: str, piece: int) -> None:
    found = role("qwen3_moe", f"model.layers.5.mlp.experts.17.{name}.weight", 4, 8)
    assert found.canonical == "model.layers.5.mlp.experts.gate_up_proj"
    assert found.layout == (
        Step("stack", 0, index=17),
        Step("concatenate", 1, index=piece, count=2),
    )
    assert (found.kind, found.units) == (Kind.MATRIX, (0,))
    assert found.block == Block("model.layers", 5)
    stacked = role("qwen3_moe", "model.layers.5.mlp.experts.gate_up_proj", 32, 8, 8)
    assert (stacked.canonical, stacked.units, stacked.layout) == (found.canonical, (0, 1), ())


def test_older_names_of_experts() -> None:
    found = role("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight", 8, 4)
    assert found.canonical == "model.layers.0.mlp.experts.down_proj"
    assert (found.units, found.layout) == ((0,), (Step("stack", 0, index=3),))
    router = role("mixtral", "model.layers.0.block_sparse_moe.gate.weight", 4, 8)
    assert (router.kind, router.canonical) == (Kind.ROUTER, "model.layers.0.mlp.gate.weight")


def test_stacks_with_inputs_first() -> None:
    for model_type, name in (
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("llama4_text", "model.layers.0.feed_forward.experts.gate_up_proj"),
        ("llama4", "language_model.model.layers.0.feed_forward.experts.gate_up_proj"),
    ):
        assert role(model_type, name, 4, 8, 16).units == (0, 2), model_type
    alternate = role("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", 4, 8, 16).experts
    assert alternate is not None and alternate.transposed and not alternate.concatenated
    bias = role("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias", 4, 16)
    assert (bias.kind, bias.units) == (Kind.BIAS, (0, 1))


def test_a_file_may_hold_the_transpose() -> None:
    """qwen3_vl_moe as published is [E, in, out], its module [E, out, in]: the width tells."""
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    published = role("qwen3_vl_moe", name, 4, 8, 12, **WIDTH)
    assert (published.units, published.layout) == ((0, 2), (Step("transpose", 1, other=2),))
    assert role("qwen3_vl_moe", name, 4, 12, 8, **WIDTH).units == (0, 1)
    down = name.replace("gate_up", "down")
    assert role("qwen3_vl_moe", down, 4, 6, 8, **WIDTH).units == (0, 2)
    assert role("qwen3_vl_moe", down, 4, 8, 6, **WIDTH).units == (0, 1)


def test_a_transpose_that_nothing_tells_is_refused_on_use() -> None:
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    roles = roles_of({"model_type": "qwen3_vl_moe"}, {name: ((4, 8, 12), "BF16")})
    with pytest.raises(InputError) as error:
        roles.unit_axes(name)
    assert str(error.value) == (
        f"output units of {name!r}: expected a model whose layout is known, got a stack [4, 8, 12] "
        "whose layout only hidden_size of the configuration tells. Name the axis with row_axis, or "
        "leave the tensor out."
    )


def test_what_transformers_leaves_aside() -> None:
    found = role("qwen3_next", "mtp.layers.0.mlp.down_proj.weight", 8, 8)
    assert not found.loaded and found.kind is Kind.MATRIX
    roles = roles_of(
        {"model_type": "gpt2"},
        {"h.0.attn.bias": ((1, 1, 64, 64), "F32"), "h.0.attn.c_attn.bias": ((24,), "F32")},
    )
    assert (roles["h.0.attn.bias"].kind, roles["h.0.attn.bias"].loaded) == (Kind.DERIVED, False)
    assert roles["h.0.attn.c_attn.bias"].loaded
    assert not roles.assumed


def test_layers_beyond_the_configuration_are_left_aside() -> None:
    tensors = {
        f"model.layers.{layer}.{name}.weight": ((8, 8), "BF16")
        for layer in (59, 60, 61)
        for name in ("self_attn.o_proj", "mlp.experts.3.down_proj")
    }
    roles = roles_of({"model_type": "deepseek_v3", "num_hidden_layers": 61}, tensors)
    for name, role in roles.items():
        assert role.loaded == ("layers.61." not in name)


def test_what_the_tree_lacks_is_told() -> None:
    roles = roles_of({"model_type": "llama"}, {"model.extra.weight": ((8, 8), "F32")})
    assert roles.assumed == (
        "model.extra.weight: not in the module tree of LlamaForCausalLM, taken for what the "
        "headers show",
    )
    assert roles["model.extra.weight"].units == (0,)


def test_a_bias_that_the_default_configuration_leaves_out() -> None:
    found = role("llama", "model.layers.0.self_attn.q_proj.bias", 8)
    assert (found.kind, found.owner, found.units) == (Kind.BIAS, "Linear", (0,))


def test_words_of_every_kind_of_tensor() -> None:
    for model_type, name, shape, axis in (
        ("bart", "final_logits_bias", (1, 64), 1),
        ("bert", "cls.predictions.bias", (64,), 0),
        ("modernbert", "decoder.bias", (64,), 0),
        ("gemma3n_text", "model.embed_tokens_per_layer.weight", (64, 8), 0),
        ("gemma3n", "model.language_model.embed_tokens_per_layer.weight", (64, 8), 0),
        ("nemotron_h", "backbone.embeddings.weight", (64, 8), 0),
        ("mamba", "backbone.embeddings.weight", (64, 8), 0),
        ("bert", "bert.embeddings.token_type_embeddings.weight", (2, 8), None),
        ("bert", "bert.embeddings.position_embeddings.weight", (64, 8), None),
    ):
        assert role(model_type, name, *shape).vocabulary == axis, name


def test_ties_follow_the_configuration() -> None:
    tensors = {"model.embed_tokens.weight": ((64, 8), "BF16")}
    for config, tied in (
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "gemma"}, True),
        ({"model_type": "gemma", "tie_word_embeddings": False}, False),
    ):
        roles = roles_of(config, tensors)
        assert roles.tied is tied
        assert roles.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    headless = roles_of({"model_type": "llama", "architectures": ["LlamaModel"]}, tensors)
    assert headless.ties == {}


def test_fields_of_stacks_of_parts() -> None:
    roles = roles_of({"model_type": "gemma3"}, {})
    fields = roles.stacks["model.language_model.layers"]
    assert (fields.part, fields.count) == ("text_config", "num_hidden_layers")
    assert fields.lists == ("layer_types",)

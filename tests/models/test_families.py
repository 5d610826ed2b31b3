"""Roles of well-known families against the modules themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from magic_fast.models import Kind, ModelRoles, roles_of
from magic_fast.models.built.classes import built
from models.architectures import (
    WORDS,
    as_in_file,
    config_of,
    each_unit_has_one_number,
    headers,
    in_memory,
    numbers_of_units,
    owners,
    units_by_class,
)

transformers = pytest.importorskip("transformers", minversion="5.20")


@dataclass
class Family:
    model: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()
    head: str | None = None

    def __str__(self) -> str:
        return self.model


TEXT: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "depth": 2,
          "num_attention_heads": 4, "num_heads": 4, "image_size": 16, "patch_size": 8,
          "out_hidden_size": 32}  # fmt: skip
GPT = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4}
BERT = {**TEXT, "max_position_embeddings": 40}
SEQ = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
LAYERS, VLM = ("model.layers",), ("model.language_model.layers",)

FAMILIES = [
    Family("LlamaForCausalLM", "LlamaConfig", TEXT, LAYERS, "lm_head.weight"),
    Family("Qwen2ForCausalLM", "Qwen2Config", TEXT, LAYERS, "lm_head.weight"),
    Family("Qwen3ForCausalLM", "Qwen3Config", TEXT, LAYERS, "lm_head.weight"),
    Family("Qwen2MoeForCausalLM", "Qwen2MoeConfig", TEXT | EXPERTS, LAYERS, "lm_head.weight"),
    Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig",
           TEXT | EXPERTS | {"mlp_only_layers": [0]}, LAYERS, "lm_head.weight"),
    Family("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 4}, LAYERS,
           "lm_head.weight"),
    Family("GptOssForCausalLM", "GptOssConfig", TEXT | {"num_local_experts": 4}, LAYERS,
           "lm_head.weight"),
    Family("Llama4ForCausalLM", "Llama4TextConfig",
           TEXT | {"num_local_experts": 4, "intermediate_size_mlp": 64}, LAYERS, "lm_head.weight"),
    Family("GPT2LMHeadModel", "GPT2Config", GPT, ("transformer.h",), "lm_head.weight"),
    Family("BertForMaskedLM", "BertConfig", BERT, ("bert.encoder.layer",),
           "cls.predictions.decoder.weight"),
    Family("BertModel", "BertConfig", BERT, ("bert.encoder.layer",)),
    Family("RobertaForMaskedLM", "RobertaConfig", BERT, ("roberta.encoder.layer",),
           "lm_head.decoder.weight"),
    Family("ModernBertForMaskedLM", "ModernBertConfig", TEXT, LAYERS, "decoder.weight"),
    Family("T5ForConditionalGeneration", "T5Config",
           {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
            "num_decoder_layers": 3, "num_heads": 4},
           ("encoder.block", "decoder.block"), "lm_head.weight"),
    Family("BartForConditionalGeneration", "BartConfig", SEQ,
           ("model.encoder.layers", "model.decoder.layers"), "lm_head.weight"),
    Family("WhisperForConditionalGeneration", "WhisperConfig", SEQ,
           ("model.encoder.layers", "model.decoder.layers"), "proj_out.weight"),
    Family("Gemma3ForCausalLM", "Gemma3TextConfig", TEXT, LAYERS, "lm_head.weight"),
    Family("Gemma3nForCausalLM", "Gemma3nTextConfig",
           {**TEXT, "num_hidden_layers": 5, "vocab_size_per_layer_input": WORDS,
            "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0, "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 5, "intermediate_size": 48,
            "layer_types": ["full_attention"] * 5},
           LAYERS, "lm_head.weight"),
    Family("MambaForCausalLM", "MambaConfig",
           {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4,
            "pad_token_id": 0}, ("backbone.layers",), "lm_head.weight"),
    Family("NemotronHForCausalLM", "NemotronHConfig",
           {**TEXT, "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4,
            "n_routed_experts": 4, "moe_intermediate_size": 16}, LAYERS, "lm_head.weight"),
    Family("CLIPModel", "CLIPConfig",
           {"text_config": TEXT | {"projection_dim": 16}, "vision_config": VISION,
            "projection_dim": 16},
           ("text_model.encoder.layers", "vision_model.encoder.layers")),
    Family("ViTForImageClassification", "ViTConfig", VISION, ("vit.layers",)),
    Family("ResNetForImageClassification", "ResNetConfig",
           {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}),
    Family("ConvNextForImageClassification", "ConvNextConfig",
           {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}),
    Family("LlavaForConditionalGeneration", "LlavaConfig",
           {"text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"}}, VLM,
           "lm_head.weight"),
    Family("LlavaForConditionalGeneration", "LlavaConfig",
           {"text_config": TEXT | {"model_type": "mixtral", "num_local_experts": 4},
            "vision_config": VISION | {"model_type": "siglip_vision_model"}}, VLM,
           "lm_head.weight"),
    Family("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
           {"text_config": TEXT, "vision_config": VISION},
           (*VLM, "model.visual.blocks"), "lm_head.weight"),
    Family("Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
           {"text_config": TEXT, "vision_config": VISION},
           (*VLM, "model.visual.blocks"), "lm_head.weight"),
    Family("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
           {"text_config": TEXT | EXPERTS, "vision_config": VISION},
           (*VLM, "model.visual.blocks"), "lm_head.weight"),
    Family("VitsModel", "VitsConfig", {"vocab_size": WORDS}),
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    return built(family.model, getattr(transformers, family.config)(**family.fields))


@pytest.fixture(scope="module")
def roles(model: Any) -> ModelRoles:
    return roles_of(config_of(model), in_memory(model))


def test_nothing_is_assumed(roles: ModelRoles) -> None:
    assert not roles.assumed


def test_units_are_those_of_the_owner(model: Any, roles: ModelRoles) -> None:
    for name, module, local, tensor in owners(model):
        assert roles[name].owner == type(module).__name__
        expected = units_by_class(module, local)
        if expected is not None:
            assert roles[name].units == expected, name
        elif hasattr(module, "is_transposed") and tensor.dim() == 3:
            assert roles[name].units == ((0, 2) if module.is_transposed else (0, 1)), name


def test_every_axis_of_words_is_known(roles: ModelRoles, model: Any) -> None:
    for name, (shape, _) in in_memory(model).items():
        words = [axis for axis, size in enumerate(shape) if size == WORDS]
        assert roles.vocabulary_axis(name) == (words[0] if words else None), name


def test_head(roles: ModelRoles, family: Family) -> None:
    heads = [name for name, role in roles.items() if role.kind is Kind.HEAD]
    assert heads == ([family.head] if family.head else [])


def test_ties_are_those_of_the_class(model: Any, roles: ModelRoles) -> None:
    model.config.tie_word_embeddings = True
    expected = model.get_expanded_tied_weights_keys(all_submodels=True)
    names = {name: role.canonical for name, role in roles.items()}
    assert roles.ties == {names[a]: names[b] for a, b in expected.items()}
    for alias, source in expected.items():
        assert roles.tie_of(alias) == roles.tie_of(source) == names[source]


def test_blocks_are_the_lists_of_layers(model: Any, roles: ModelRoles, family: Family) -> None:
    lists = {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    }
    prefix = "bert." if family.model == "BertModel" else ""
    for stack in family.stacks:
        numbers = {r.block.number for r in roles.values() if r.block and r.block.stack == stack}
        assert numbers == set(range(lists[stack.removeprefix(prefix)])), stack


def test_fields_of_the_stacks(model: Any, roles: ModelRoles, family: Family) -> None:
    config = config_of(model)
    for stack in family.stacks:
        fields = roles.stacks[stack]
        part = config[fields.part] if fields.part else config
        count = 1 + max(
            r.block.number for r in roles.values() if r.block and r.block.stack == stack
        )
        if fields.count is not None:
            assert part[fields.count] == count
        for name in fields.lists:
            assert len(part[name]) == count


def test_the_file_is_the_same_model(model: Any, roles: ModelRoles) -> None:
    """Whatever layout the published files have, each parameter is found under its name, and its
    output units are where the file has them."""
    numbered = {
        name: numbers_of_units(t, roles[name].units) for name, t in model.state_dict().items()
    }
    stored = as_in_file(model, numbered)
    found = roles_of(config_of(model), headers(stored))
    assert not found.assumed
    targets = {target for role in found.values() for target in role.targets}
    assert targets == {role.canonical for role in roles.values()}
    kinds = {role.canonical: role.kind for role in roles.values()}
    for name, role in found.items():
        assert role.kind is kinds[role.canonical], name
        if role.units:
            assert each_unit_has_one_number(stored[name], role.units), name

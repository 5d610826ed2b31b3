"""A type that the table lacks, by the installed transformers."""

from __future__ import annotations

import pytest

from magic_fast.models import Source, assign, live, roles_of
from magic_fast.models.built.classes import built
from models.architectures import config_of, in_memory

transformers = pytest.importorskip("transformers", minversion="5.20")


def tiny() -> object:
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=2, num_experts_per_tok=1, mlp_only_layers=[0],
    )  # fmt: skip
    return built("Qwen3MoeForCausalLM", config)


def test_its_roles_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    config, tensors = config_of(model), in_memory(model)
    shipped = roles_of(config, tensors)
    monkeypatch.setattr(assign, "entry_of", lambda model_type: None)
    made = roles_of(config, tensors)
    assert (shipped.source, made.source) == (Source.TABLE, Source.TRANSFORMERS)
    assert dict(made) == dict(shipped)
    assert (made.ties, made.tied, made.stacks) == (shipped.ties, shipped.tied, shipped.stacks)


def test_parts_come_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    monkeypatch.setattr(assign, "entry_of", lambda model_type: None)
    role = roles_of(config, {name: ((8, 8), "F32")})[name]
    assert role.canonical == "model.language_model.layers.0.mlp.up_proj.weight"


def test_a_type_that_it_does_not_know() -> None:
    assert live.entry_by_transformers({"model_type": "nobody_knows_it"}) is None


def test_no_code_of_a_checkpoint_is_asked_for() -> None:
    config = {"a": {"auto_map": {"AutoModel": "x--y.Z"}, "b": 1}, "auto_map": {}}
    assert live._own_code(config) == {"a": {"b": 1}}


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "find_spec", lambda name: None)
    roles = roles_of({"model_type": "nobody_knows_it"}, {})
    assert roles.source is Source.HEADERS

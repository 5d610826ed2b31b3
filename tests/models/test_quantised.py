"""Which tensors of a checkpoint hold codes or their scales, and by which scheme."""

from __future__ import annotations

import pytest

from magic_fast.models import Kind, quantisation_of, roles_of

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
X = "model.layers.0.mlp.up_proj"
NORM = {"model.layers.0.input_layernorm.weight": ((16,), "BF16")}

SCHEMES = {
    "bitsandbytes 4-bit": {
        "weight": ((128, 1), "U8"),
        "weight.absmax": ((4,), "F32"),
        "weight.quant_map": ((16,), "F32"),
        "weight.quant_state.bitsandbytes__nf4": ((80,), "U8"),
    },
    "bitsandbytes 8-bit": {"weight": ((16, 16), "I8"), "SCB": ((16,), "F32")},
    "GPTQ": {
        "qweight": ((2, 16), "I32"),
        "qzeros": ((1, 2), "I32"),
        "scales": ((1, 16), "F16"),
        "g_idx": ((16,), "I32"),
    },
    "AWQ or GPTQ": {
        "qweight": ((16, 2), "I32"),
        "qzeros": ((1, 2), "I32"),
        "scales": ((1, 16), "F16"),
    },
    "FP8": {"weight": ((16, 16), "F8_E4M3"), "weight_scale_inv": ((1, 1), "F32")},
    "compressed-tensors": {
        "weight_packed": ((16, 2), "I32"),
        "weight_scale": ((16, 1), "BF16"),
        "weight_shape": ((2,), "I64"),
    },
    "MLX": {"weight": ((16, 2), "U32"), "scales": ((16, 1), "BF16"), "biases": ((16, 1), "BF16")},
}


def tensors(scheme: str) -> dict[str, tuple[tuple[int, ...], str]]:
    return {f"{X}.{leaf}": header for leaf, header in SCHEMES[scheme].items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_by_the_tensors(scheme: str) -> None:
    found = quantisation_of(LLAMA, {**tensors(scheme), **NORM})
    assert found is not None
    assert found.scheme == scheme
    assert found.tensors == tensors(scheme).keys()


def test_codes_stored_as_the_bits_of_numbers() -> None:
    stored = tensors("bitsandbytes 4-bit") | {f"{X}.weight": ((128, 1), "BF16")}
    found = quantisation_of(LLAMA, {**stored, **NORM})
    assert found is not None
    assert found.codes == {f"{X}.weight"}
    role = roles_of(LLAMA, {**stored, **NORM})[f"{X}.weight"]
    assert (role.kind, role.units) == (Kind.QUANTISED, None)


def test_experts_in_mxfp4_beside_attention_in_numbers() -> None:
    e, q = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj.weight"
    stored = {
        f"{e}_blocks": ((2, 16, 1, 16), "U8"),
        f"{e}_scales": ((2, 16, 1), "U8"),
        q: ((16, 16), "BF16"),
    }
    found = quantisation_of({"model_type": "gpt_oss"}, stored)
    assert found is not None
    assert (found.scheme, found.tensors) == ("MXFP4", {f"{e}_blocks", f"{e}_scales"})


def test_stacks_of_experts_in_fp8() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    stored = {name: ((2, 16, 16), "F8_E4M3"), f"{name}_scale_inv": ((2, 1, 1), "F32")}
    found = quantisation_of({}, stored)
    assert found is not None
    assert found.tensors == stored.keys()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "unheard-of"}, "unheard-of"),
        ({}, "GPTQ"),
    ],
)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_scheme_by_the_configuration(settings: dict, said: str, part: str | None) -> None:
    config = {"quantization_config": settings}
    found = quantisation_of({part: config} if part else config, tensors("GPTQ"))
    assert found is not None
    assert found.scheme == said


@pytest.mark.parametrize(
    "stored",
    [
        {f"{X}.weight": ((16, 16), "BF16")},
        {"h.0.attn.bias": ((1, 1, 16, 16), "U8"), "h.0.attn.c_attn.weight": ((4, 12), "F32")},
        {"bn.num_batches_tracked": ((), "I64"), "bn.weight": ((4,), "F32")},
        {"embeddings.position_ids": ((1, 512), "I64")},
        {"attn.relative_position_index": ((49, 49), "I64")},
        {f"{X}.weight": ((16, 16), "BF16"), f"{X}.weight_scale": ((16, 1), "F32")},
    ],
)
def test_what_is_not_quantised(stored: dict) -> None:
    """Nor is a model whose configuration alone says so: its weights were made numbers again."""
    assert quantisation_of({"quantization_config": {"quant_method": "fp8"}}, stored) is None


def test_integers_of_which_nothing_says_what_they_are() -> None:
    assert quantisation_of(LLAMA, {"a.weight": ((4, 8), "I32")}) is None

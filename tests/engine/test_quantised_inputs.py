"""Quantised checkpoints given as inputs: named and refused when the merge is planned, or copied
where all hold the same codes and scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf

X = "model.layers.0.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
GPTQ = {"quant_method": "gptq", "bits": 4}


def gptq(seed: int = 0, width: int = 16) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{X}.qweight": torch.randint(0, 9999, (2, width), dtype=torch.int32, generator=draw),
        f"{X}.scales": torch.rand(1, width, generator=draw).half(),
        f"{X}.g_idx": torch.zeros(16, dtype=torch.int32),
        NORM: torch.randn(16, generator=draw).bfloat16(),
    }


def write(folder: Path, tensors: dict[str, Tensor], settings: dict | None = None) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    more = {"quantization_config": settings} if settings is not None else {}
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    return str(folder)


def task_arithmetic(base: str, expert: str) -> dict:
    models = [{"model": expert, "parameters": {"weight": 0.5}}]
    return {"merge_method": "task_arithmetic", "base_model": base, "models": models}


def test_other_codes_are_refused_when_planned(tmp_path: Path) -> None:
    a, b = (write(tmp_path / n, gptq(seed), GPTQ) for n, seed in (("a", 0), ("b", 1)))
    with pytest.raises(mf.CheckpointError) as caught:
        mf.plan_checkpoints(task_arithmetic(a, b), tmp_path / "out")
    assert str(caught.value) == (
        f"quantised model for {b}: expected weights as F64, F32, F16, BF16, got GPTQ 4-bit codes "
        f"('{X}.qweight', which differs from {a}'s). Codes cannot be averaged: name the model "
        "that it was quantised from, or make them numbers first."
    )


def test_other_scales_of_the_same_codes_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", gptq(), GPTQ)
    b = write(tmp_path / "b", gptq() | {f"{X}.scales": 2 * gptq()[f"{X}.scales"]}, GPTQ)
    with pytest.raises(mf.CheckpointError, match=r"quantised model .*up_proj\.scales"):
        mf.plan_checkpoints(task_arithmetic(a, b), tmp_path / "out")


@pytest.mark.parametrize("backend", [None, "torch"])
def test_scales_that_differ_at_their_end_are_refused_by_the_merge(
    backend: str | None, tmp_path: Path
) -> None:
    one, other = gptq(width=40_000), gptq(width=40_000)
    other[f"{X}.scales"][0, -1] += 1
    a, b = write(tmp_path / "a", one, GPTQ), write(tmp_path / "b", other, GPTQ)
    config = task_arithmetic(a, b)
    mf.plan_checkpoints(config, tmp_path / "out")
    with pytest.raises(mf.InputError) as caught:
        mf.merge_checkpoints(config, tmp_path / "out", backend=backend)
    assert str(caught.value) == (
        f"scales of quantised weights '{X}.scales' in {b}: expected the values of {a}, got "
        "others. They are not merged; they must agree."
    )


@pytest.mark.parametrize("backend", [None, "torch"])
def test_equal_codes_and_scales_are_copied(backend: str | None, tmp_path: Path) -> None:
    base, expert = gptq(), gptq() | {NORM: gptq(5)[NORM]}
    config = task_arithmetic(write(tmp_path / "a", base, GPTQ), write(tmp_path / "b", expert, GPTQ))
    mf.merge_checkpoints(config | {"dtype": "float32"}, tmp_path / "out", backend=backend)
    out = load_file(tmp_path / "out" / "model.safetensors")
    want = base[NORM].float() + 0.5 * (expert[NORM].float() - base[NORM].float())
    assert torch.equal(out.pop(NORM), want)
    del base[NORM]
    assert out.keys() == base.keys()
    assert all(torch.equal(out[n], x) and out[n].dtype == x.dtype for n, x in base.items())
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings == GPTQ


def test_slices_of_models_of_other_codes_are_copied(tmp_path: Path) -> None:
    """No tensor of the result has two sources."""
    a, b = (write(tmp_path / n, gptq(seed), GPTQ) for n, seed in (("a", 0), ("b", 1)))
    slices = [{"sources": [{"model": m, "layer_range": [0, 1]}]} for m in (a, b)]
    mf.merge_checkpoints({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for seed in (0, 1):
        for name, x in gptq(seed).items():
            assert torch.equal(out[name.replace("layers.0", f"layers.{seed}")], x)


@pytest.mark.parametrize("quantised_first", [True, False])
def test_one_quantised_model_among_others(quantised_first: bool, tmp_path: Path) -> None:
    full = {f"{X}.weight": torch.randn(16, 16).bfloat16(), NORM: gptq()[NORM]}
    pair = [write(tmp_path / "q", gptq(), GPTQ), write(tmp_path / "full", full)]
    config = task_arithmetic(*(pair if quantised_first else pair[::-1]))
    with pytest.raises(mf.CheckpointError, match=r"quantised model .*GPTQ.*full is not quantised"):
        mf.plan_checkpoints(config, tmp_path / "out")


def test_fp8_is_named(tmp_path: Path) -> None:
    weights = {f"{X}.weight": torch.randn(16, 16).to(torch.float8_e4m3fn), NORM: torch.ones(16)}
    a, b = (write(tmp_path / n, weights) for n in "ab")
    with pytest.raises(mf.CheckpointError, match=r"got FP8 codes .* of F8_E4M3"):
        mf.plan_checkpoints(task_arithmetic(a, b), tmp_path / "out")


def test_calibrations_and_inspections_refuse_them_too(tmp_path: Path) -> None:
    a, b = (write(tmp_path / n, gptq(seed), GPTQ) for n, seed in (("a", 0), ("b", 1)))
    with pytest.raises(mf.CheckpointError, match="quantised model"):
        mf.inspect_checkpoints(a, [b])
    with pytest.raises(mf.CheckpointError, match="quantised model"):
        mf.calibrate_checkpoints(a, [b], a, tmp_path / "out")


@pytest.mark.parametrize("codes", ["U8", "the bits of numbers"])
def test_an_adapter_on_a_quantised_model(codes: str, tmp_path: Path) -> None:
    stored = torch.randint(0, 99, (128, 1), dtype=torch.uint8)
    weights = {
        f"{X}.weight": stored
        if codes == "U8"
        else stored.view(-1).view(torch.bfloat16).view(-1, 1),
        f"{X}.weight.absmax": torch.rand(4),
        f"{X}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
        NORM: torch.ones(16),
    }
    model = write(tmp_path / "q", weights)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    save_file(
        {f"base_model.model.{X}.{n}.weight": x for n, x in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    config = {"merge_method": "passthrough", "models": [{"model": f"{model}+{adapter}"}]}
    with pytest.raises(mf.CheckpointError, match="bitsandbytes 4-bit codes"):
        mf.plan_checkpoints(config, tmp_path / "out")


def test_gguf_files_are_called_so(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    for path in (file, tmp_path):
        config = {"merge_method": "linear", "models": [{"model": str(path)}]}
        with pytest.raises(mf.CheckpointError, match=r"got .*a GGUF file, whose weights are quant"):
            mf.plan_checkpoints(config, tmp_path / "out")

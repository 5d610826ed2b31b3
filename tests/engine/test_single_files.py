"""Bare files of diffusion models: names as in the published checkpoints, no configuration beside
them, parameters by parts of names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from magic_fast.cli import main

LAYOUTS = {
    "sd15": [
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.11.0.out_layers.3.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight",
    ],
    "sdxl": [
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
        "first_stage_model.encoder.down.0.block.0.conv1.weight",
    ],
    "flux": [
        "double_blocks.18.img_attn.qkv.weight",
        "double_blocks.18.txt_mod.lin.bias",
        "single_blocks.37.linear1.weight",
        "final_layer.adaLN_modulation.1.weight",
        "guidance_in.in_layer.weight",
        "img_in.weight",
    ],
}
#: Part of a name → share of the second model; the first that matches, else a half.
FILTERS = {
    "sd15": {"first_stage_model": 0.0, "cond_stage_model": 1.0, "attn1": 0.25},
    "sdxl": {"conditioner.embedders.1": 0.25, "first_stage_model": 1.0},
    "flux": {"double_blocks": 0.75, "guidance_in": 0.0},
}


def tensors(layout: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in LAYOUTS[layout]:
        shape = (8,) if name.endswith("bias") else (4, 8)
        shape = (*shape, 3, 3) if "conv" in name or "out_layers" in name else shape
        made[name] = torch.randint(-64, 64, shape, generator=generator).to(torch.float16)
    if layout == "sd15":
        ids = torch.arange(77).reshape(1, -1)
        made["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids
    return made


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_filters_by_key(layout: str, method: str, tmp_path: Path) -> None:
    """Shares that are powers of two, of whole numbers: linear is exact in float16."""
    models = [tensors(layout, seed) for seed in (1, 2)]
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for path, model in zip(paths, models, strict=True):
        save_file(model, path)
    shares = FILTERS[layout]

    def setting(second: bool) -> list[dict[str, object]]:
        value = {word: share if second else 1 - share for word, share in shares.items()}
        return [*({"filter": w, "value": v} for w, v in value.items()), {"value": 0.5}]

    entries = [{"model": path} for path in paths]
    if method == "linear":
        for entry, second in zip(entries, (False, True), strict=True):
            entry["parameters"] = {"weight": setting(second)}  # type: ignore[assignment]
        parameters: dict[str, object] = {"normalize": False}
    else:
        parameters = {"t": setting(True)}
    config = {"merge_method": method, "models": entries, "parameters": parameters}
    if method == "slerp":
        config["base_model"] = paths[0]
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(tmp_path / "merge.yml"), str(out), "-q"]) == 0
    merged = load_file(out)
    assert set(merged) == set(models[0])
    for name, got in merged.items():
        a, b = (model[name] for model in models)
        assert got.dtype == a.dtype
        if not a.is_floating_point():
            assert torch.equal(got, a)
            continue
        share = next((s for word, s in shares.items() if word in name), 0.5)
        if method == "linear":
            assert torch.equal(got, ((1 - share) * a.float() + share * b.float()).half()), name
        elif share in (0.0, 1.0):
            assert torch.equal(got, b if share else a), name


def test_a_key_that_one_file_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    models = [tensors("flux", seed) for seed in (1, 2)]
    del models[1]["guidance_in.in_layer.weight"]  # as in the distilled releases
    for path, model in zip(paths, models, strict=True):
        save_file(model, path)
    config = {"merge_method": "average", "models": [{"model": path} for path in paths]}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(tmp_path / "merge.yml"), str(out), "-q"]) == 2
    assert "guidance_in.in_layer.weight" in capsys.readouterr().err
    assert not out.exists()

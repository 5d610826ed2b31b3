"""Names and adapters of diffusion models against diffusers itself. Run by test_environments.py in
an environment that has it (`make peers-diffusers`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders import lora_conversion_utils, single_file_utils
from diffusers.loaders.lora_pipeline import (
    FluxLoraLoaderMixin,
    QwenImageLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    WanLoraLoaderMixin,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import magic_fast as mf
from magic_fast.adapters import open_adapter
from magic_fast.adapters.joined import in_one_convention
from magic_fast.models.diffusion import Naming
from magic_fast.models.diffusion.names import map_of

ROOT = Path(__file__).resolve().parents[2]
FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
    "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "unet_1": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 16},
    "unet_xl": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 3], "use_linear_projection": True,
        "cross_attention_dim": 16, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 56,
    },
}  # fmt: skip
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
    "image_dim": 16, "added_kv_proj_dim": 24,
}  # fmt: skip


def test_the_shipped_names_are_what_its_converters_say(tmp_path: Path) -> None:
    made = tmp_path / "names.json"
    generate = ROOT / "tools" / "diffusion_names" / "generate.py"
    subprocess.run([sys.executable, str(generate), "--output", str(made)], check=True)
    shipped = ROOT / "magic_fast" / "models" / "diffusion" / "names.json"
    assert json.loads(made.read_text()) == json.loads(shipped.read_text())


def original(state: dict[str, Tensor], name: str, prefix: str = "") -> dict[str, Tensor]:
    """Diffusers' weights under their original names, of maps without fused rows."""
    found = {}
    for ours, tensor in state.items():
        (link,) = map_of(name).links(ours, Naming.DIFFUSERS)
        assert link.rows is None
        found[prefix + link.names[1]] = tensor
    return found


def draw(
    shapes: dict[str, tuple[int, ...]], style: str, alphas: tuple[float, ...] = (1.5, 2.5)
) -> dict[str, Tensor]:
    """Factors for weights of these shapes by module, as kohya or as diffusers name them."""
    found = {}
    down, up = {"kohya": (".lora_down.weight", ".lora_up.weight"),
                "diffusers": (".lora_A.weight", ".lora_B.weight")}[style]  # fmt: skip
    for n, (module, (out, *into)) in enumerate(shapes.items()):
        rank = 2 + n % 3
        found[module + down] = torch.randn(rank, *into) / 4
        found[module + up] = torch.randn(out, rank, *[1] * (len(into) - 1)) / 4
        if style == "kohya":
            found[f"{module}.alpha"] = torch.tensor(alphas[n % len(alphas)])
    return found


def ours(base: dict[str, Tensor], adapter: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    for name, tensors in (("base", base), ("adapter", adapter)):
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"{name}.safetensors")
    model = f"{folder}/base.safetensors+{folder}/adapter.safetensors"
    config = {"merge_method": "passthrough", "models": [{"model": model}]}
    mf.merge_checkpoints(config, folder / "out.safetensors")
    found = load_file(folder / "out.safetensors")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return found


def fused(model: nn.Module, state: dict[str, Tensor], prefix: str, **options: Any) -> None:
    """The model with an adapter of diffusers' own reading on it."""
    model.load_lora_adapter(state, prefix=prefix, **options)
    model.fuse_lora()
    model.unload_lora()


def same(got: dict[str, Tensor], want: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert any(not torch.equal(want[n], before[n]) for n in want)


def matrices(model: nn.Module, kinds: tuple[type, ...]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("naming", ["diffusers", "ldm"])
@pytest.mark.parametrize("name", UNETS)
def test_unets_by_kohya(name: str, naming: str, tmp_path: Path) -> None:
    """kohya's names of diffusers' or LDM's blocks, on LDM's file; the result is converted by
    diffusers, which fuses its own reading of the adapter into its own model."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNETS[name])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    shapes = matrices(model, (nn.Linear, nn.Conv2d))
    shapes = {n: s for n, s in shapes.items() if ".attentions." in n}
    if naming == "ldm":
        places = {n: next(map_of(name).links(f"{n}.weight", Naming.DIFFUSERS)).names[1]
                  for n in shapes}  # fmt: skip
    else:
        places = {n: n for n in shapes}
    flat = {
        "lora_unet_" + places[n].removesuffix(".weight").replace(".", "_"): s
        for n, s in shapes.items()
    }
    adapter = draw(flat, "kohya", (1.5,))  # of several, diffusers loses those of attention
    base = original(before, name, "model.diffusion_model.")
    config = dict(model.config)
    back = single_file_utils.convert_ldm_unet_checkpoint
    assert same_tensors(back(dict(base), config), before)
    got = back(ours(base, adapter, tmp_path), config)
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        dict(adapter), unet_config=model.config
    )
    fused(model, state, "unet", network_alphas=alphas)
    same(got, model.state_dict(), before)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_flux(style: str, tmp_path: Path) -> None:
    """On diffusers' file: its own names, and BFL's by kohya, whose qkv it splits."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**FLUX)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    if style == "diffusers":
        shapes = {f"transformer.{n}": s for n, s in matrices(model, (nn.Linear,)).items()}
        adapter = draw(shapes, style)
        state, alphas = adapter, None
    else:
        block = {"img_attn_qkv": (96, 32), "txt_attn_qkv": (96, 32), "img_attn_proj": (32, 32),
                 "txt_mlp_0": (128, 32), "img_mod_lin": (192, 32)}  # fmt: skip
        adapter = draw({f"lora_unet_double_blocks_1_{n}": s for n, s in block.items()}, style)
        state, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(adapter), return_alphas=True)
    got = ours(before, adapter, tmp_path)
    fused(model, state, "transformer", network_alphas=alphas or None)
    same(got, model.state_dict(), before)


@pytest.mark.parametrize("style", ["diffusers", "original", "kohya"])
def test_wan(style: str, tmp_path: Path) -> None:
    """On the original file, which diffusers converts."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**WAN)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    shapes = {n: s for n, s in matrices(model, (nn.Linear,)).items() if n.startswith("blocks.")}
    if style != "diffusers":
        links = {n: next(map_of("wan").links(f"{n}.weight", Naming.DIFFUSERS)) for n in shapes}
        shapes = {links[n].names[1].removesuffix(".weight"): s for n, s in shapes.items()}
    before_module = {
        "diffusers": "transformer.",
        "original": "diffusion_model.",
        "kohya": "lora_unet_",
    }
    named = {
        before_module[style] + (n.replace(".", "_") if style == "kohya" else n): s
        for n, s in shapes.items()
    }
    adapter = draw(named, "kohya" if style == "kohya" else "diffusers")
    base = original(before, "wan")
    back = single_file_utils.convert_wan_transformer_to_diffusers
    got = back(ours(base, adapter, tmp_path))
    state = adapter
    if style != "diffusers":
        state = WanLoraLoaderMixin.lora_state_dict(dict(adapter))
    fused(model, state, "transformer")
    same(got, model.state_dict(), before)


def rows(tensors: dict[str, Tensor], module: str, probe: dict[int, Tensor]) -> Tensor:
    """s·B·A of a fixed vector."""
    down, up = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    alpha = tensors.get(f"{module}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    x = probe.setdefault(down.shape[1], torch.randn(down.shape[1]))
    return scale * (up @ (down @ x))


def meets(first: str, adapter: dict[str, Tensor], theirs: dict[str, Tensor], folder: Path) -> None:
    """What we make of an adapter beside one in diffusers' names is what diffusers makes of it."""
    save_file(adapter, folder / "b.safetensors")
    save_file(draw({first: (8, 8)}, "diffusers"), folder / "a.safetensors")
    opened = [open_adapter(folder / f"{n}.safetensors") for n in "ab"]
    joined, notes = in_one_convention(opened)
    assert len(notes) == 1
    probe: dict[int, Tensor] = {}
    modules = joined[1].modules
    assert set(modules) == {k.removesuffix(".lora_A.weight") for k in theirs if ".lora_A." in k}
    for name, module in modules.items():
        factors = [
            torch.frombuffer(joined[1].checkpoint.read(info.name), dtype=torch.float32).view(
                info.shape
            )
            for info in (module.down, module.up)
        ]
        x = probe.setdefault(factors[0].shape[1], torch.randn(factors[0].shape[1]))
        got = module.scaling * (factors[1] @ (factors[0] @ x))
        torch.testing.assert_close(got, rows(theirs, name, probe), rtol=1e-4, atol=1e-4, msg=name)


def test_flux_of_full_width_by_kohya(tmp_path: Path) -> None:
    """Single blocks, whose linear1 is q, k, v and the MLP, of which diffusers knows the widths."""
    d = 3072
    adapter = draw({
        "lora_unet_single_blocks_4_linear1": (7 * d, d),
        "lora_unet_single_blocks_4_linear2": (d, 5 * d),
        "lora_unet_single_blocks_4_modulation_lin": (3 * d, d),
        "lora_unet_double_blocks_4_txt_attn_qkv": (3 * d, d),
    }, "kohya")  # fmt: skip
    convert = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    meets("transformer.x_embedder", adapter, convert(dict(adapter)), tmp_path)


def peft_key(key: str) -> str:
    """In PEFT's names what diffusers' converter leaves in its older ones."""
    key = key.replace(".processor.", ".")
    key = re.sub(r"self_attn\.to_(\w+)_lora\.", r"self_attn.\1_proj.lora.", key)
    key = re.sub(r"to_out_lora\.", "to_out.0.lora.", key)
    key = re.sub(r"(to_\w+)_lora\.", r"\1.lora.", key)
    key = re.sub(r"\.lora(_linear_layer)?\.down\.", ".lora_A.", key)
    return re.sub(r"\.lora(_linear_layer)?\.up\.", ".lora_B.", key)


def test_sdxl_with_both_text_encoders_by_kohya(tmp_path: Path) -> None:
    layers = [f"{te}_text_model_encoder_layers_{n}_{m}" for te in ("te1", "te2") for n in (0, 11)
              for m in ("self_attn_q_proj", "self_attn_out_proj", "mlp_fc1")]  # fmt: skip
    blocks = ["unet_down_blocks_1_attentions_1_transformer_blocks_1_ff_net_0_proj",
              "unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0",
              "unet_up_blocks_0_attentions_2_proj_in"]  # fmt: skip
    adapter = draw({f"lora_{name}": (8, 8) for name in layers + blocks}, "kohya")
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(adapter))
    theirs = {peft_key(k): t for k, t in state.items()}
    for name, alpha in alphas.items():
        module = peft_key(name.removesuffix(".alpha")).removesuffix(".lora_A.weight")
        theirs[f"{module}.alpha"] = torch.tensor(alpha)
    meets("unet.time_embedding.linear_1", adapter, theirs, tmp_path)


def test_qwen_image_by_kohya(tmp_path: Path) -> None:
    names = ["attn_to_q", "attn_add_k_proj", "img_mlp_net_0_proj", "txt_mod_1", "attn_to_out_0"]
    adapter = draw({f"lora_unet_transformer_blocks_3_{n}": (8, 8) for n in names}, "kohya")
    theirs = QwenImageLoraLoaderMixin.lora_state_dict(dict(adapter))
    meets("transformer.img_in", adapter, theirs, tmp_path)


def test_merged_adapters_of_mixed_ranks_load_at_their_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**FLUX)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    names = [f"transformer.transformer_blocks.{n}.attn.to_q" for n in (0, 1)]
    drawn = [draw(dict.fromkeys(names[k:], (32, 32)), "diffusers") for k in (0, 1)]
    for name, tensors in zip("ab", drawn, strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    mf.merge_adapters([tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
                      out / "pytorch_lora_weights.safetensors", "task_arithmetic")  # fmt: skip
    state, metadata = FluxLoraLoaderMixin.lora_state_dict(out, return_lora_metadata=True)
    assert metadata["transformer.r"] == 5
    fused(model, state, "transformer", metadata=metadata)
    for name in names:
        want = sum(
            t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"]
            for t in drawn
            if f"{name}.lora_A.weight" in t
        )
        weight = f"{name.removeprefix('transformer.')}.weight"
        torch.testing.assert_close(
            model.state_dict()[weight] - before[weight], want, rtol=1e-4, atol=1e-5
        )

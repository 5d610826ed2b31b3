"""Adapters of diffusion models on files of another convention, and merged with such adapters:
values by plain torch, the names and rows written out here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf
from adapters.adapter_files import draw_lora, write_peft
from magic_fast.planning.sources import open_model

#: convention → what comes before a module, and the keys of A and B
KEYS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "old": (".lora.down.weight", ".lora.up.weight"),
}


class Factors:
    """Factors of modules, as a file has them."""

    def __init__(self, seed: int, style: str, shapes: dict[str, tuple[int, ...]]):
        generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.style, self.deltas = style, {}
        for n, (module, (out, into)) in enumerate(shapes.items()):
            rank = 2 + n % 2
            a = torch.randn(rank, into, generator=generator)
            b = torch.randn(out, rank, generator=generator)
            down, up = KEYS[style]
            self.tensors |= {module + down: a, module + up: b}
            scale = 1.0
            if style == "kohya":
                self.tensors[f"{module}.alpha"] = torch.tensor(float(n + 1))
                scale = (n + 1) / rank
            self.deltas[module] = scale * b @ a

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> Path:
        save_file({n: t.to(dtype).contiguous() for n, t in self.tensors.items()}, path)
        return path


def applied(base: dict[str, Tensor], factors: Factors, folder: Path) -> dict[str, Tensor]:
    """The base with the adapter on it, by a merge."""
    save_file({n: t.contiguous() for n, t in base.items()}, folder / "base.safetensors")
    factors.save(folder / "adapter.safetensors")
    merged(folder)
    return load_file(folder / "out.safetensors")


def merged(folder: Path) -> Any:
    model = f"{folder}/base.safetensors+{folder}/adapter.safetensors"
    config = {"merge_method": "passthrough", "models": [{"model": model}]}
    return mf.merge_checkpoints(config, folder / "out.safetensors")


def check(got: dict[str, Tensor], base: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    for name, w in base.items():
        want = w + changes.get(name, torch.zeros_like(w))
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(got[name], w) or name not in changes


D = 6
UNET = "model.diffusion_model."
INNER = "transformer_blocks.0.attn1.to_q"


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("module", "place"),
    [
        (f"down_blocks.1.attentions.1.{INNER}", f"input_blocks.5.1.{INNER}"),
        (f"mid_block.attentions.0.{INNER}", f"middle_block.1.{INNER}"),
        (f"up_blocks.3.attentions.2.{INNER}", f"output_blocks.11.1.{INNER}"),
        ("up_blocks.1.resnets.2.time_emb_proj", "output_blocks.5.0.emb_layers.1"),
        ("down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
        ("time_embedding.linear_2", "time_embed.2"),
    ],
)
@pytest.mark.parametrize("style", ["kohya", "diffusers", "ldm"])
def test_stable_diffusion_1(style: str, module: str, place: str, tmp_path: Path) -> None:
    """Names of diffusers, with dots or kohya's underscores, on LDM's file; kohya's of LDM on that
    of diffusers."""
    base = weights({f"{UNET}{place}.weight": (D, D), f"{UNET}input_blocks.1.1.norm.weight": (D,)})
    named = {
        "kohya": "lora_unet_" + module.replace(".", "_"),
        "diffusers": f"unet.{module}",
        "ldm": "lora_unet_" + place.replace(".", "_"),
    }[style]
    if style == "ldm":
        base = weights({f"{module}.weight": (D, D), "down_blocks.0.attentions.0.norm.weight": (D,)})
    factors = Factors(0, "kohya" if style != "diffusers" else style, {named: (D, D)})
    changed = f"{module}.weight" if style == "ldm" else f"{UNET}{place}.weight"
    check(applied(base, factors, tmp_path), base, {changed: factors.deltas[named]})


TE1 = "conditioner.embedders.0.transformer.text_model.encoder.layers.1."
TE2 = "conditioner.embedders.1.model.transformer.resblocks.1."
LAYER = "text_model.encoder.layers.1."


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_both_text_encoders_of_sdxl(style: str, tmp_path: Path) -> None:
    """The second one's q, k and v are rows of one tensor, and its projection is stored turned."""
    base = weights({
        f"{TE1}self_attn.v_proj.weight": (D, D),
        f"{TE2}attn.in_proj_weight": (3 * D, D),
        f"{TE2}attn.out_proj.weight": (D, D),
        f"{TE2}mlp.c_fc.weight": (4 * D, D),
        "conditioner.embedders.1.model.text_projection": (D, D),
        "conditioner.embedders.1.model.logit_scale": (),
        f"{UNET}input_blocks.4.1.{INNER}.weight": (D, D),
    })  # fmt: skip
    first, second = ("text_encoder.", "text_encoder_2.")
    modules = [first + LAYER + "self_attn.v_proj"] + [
        f"{second}{LAYER}{m}" for m in ("self_attn.v_proj", "self_attn.q_proj", "mlp.fc1")
    ]
    shapes = dict.fromkeys([*modules, f"{second}text_projection"], (D, D))
    shapes[modules[3]] = (4 * D, D)
    if style == "kohya":
        names = {first: "lora_te1_", second: "lora_te2_"}
        shapes = {
            names[m.partition(".")[0] + "."] + m.partition(".")[2].replace(".", "_"): shape
            for m, shape in shapes.items()
        }
    factors = Factors(1, style, shapes)
    v1, v2, q2, fc, projection = factors.deltas.values()
    check(applied(base, factors, tmp_path), base, {
        f"{TE1}self_attn.v_proj.weight": v1,
        f"{TE2}attn.in_proj_weight": torch.cat([q2, torch.zeros(D, D), v2]),
        f"{TE2}mlp.c_fc.weight": fc,
        "conditioner.embedders.1.model.text_projection": projection.T,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("transformer_blocks.0.attn.add_q_proj", f"{UNET}transformer_blocks.0.attn.add_q_proj"),
        ("lycoris_transformer_blocks_0_img_mlp_net_2", "transformer_blocks.0.img_mlp.net.2"),
        ("diffusion_model.transformer_blocks.7.txt_mod.1", "transformer_blocks.7.txt_mod.1"),
        ("lora_unet_blocks_3_cross_attn_k_img", "blocks.3.attn2.add_k_proj"),
        ("blocks.3.ffn.2", "blocks.3.ffn.net.2"),
        ("transformer.blocks.3.attn1.to_out.0", f"{UNET}blocks.3.self_attn.o"),
        ("transformer.vace_blocks.0.proj_in", "vace_blocks.0.before_proj"),
        ("lora_te3_encoder_block_5_layer_0_SelfAttention_q",
         "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.q"),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc2",
         "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc2"),
    ],
)  # fmt: skip
def test_qwen_image_wan_and_the_text_encoders_of_flux(
    module: str, place: str, tmp_path: Path
) -> None:
    base = weights({f"{place}.weight": (D, D)})
    factors = Factors(1, "kohya" if module.startswith("l") else "diffusers", {module: (D, D)})
    check(applied(base, factors, tmp_path), base, {f"{place}.weight": factors.deltas[module]})


def flux(prefix: str = "") -> dict[str, Tensor]:
    """BFL's names."""
    return weights({
        f"{prefix}double_blocks.3.img_attn.qkv.weight": (3 * D, D),
        f"{prefix}double_blocks.3.txt_attn.qkv.weight": (3 * D, D),
        f"{prefix}single_blocks.11.linear1.weight": (7 * D, D),
        f"{prefix}single_blocks.11.linear2.weight": (D, 5 * D),
        f"{prefix}final_layer.adaLN_modulation.1.weight": (2 * D, D),
        f"{prefix}double_blocks.3.img_attn.norm.query_norm.scale": (4,),
    })  # fmt: skip


def flux_of_diffusers(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters as diffusers has them, by hand."""
    order = ("img_attn.qkv", "txt_attn.qkv", "linear1", "linear2", "modulation.1", "query_norm")
    x = [next(t for n, t in fused.items() if f"{part}." in n) for part in order]
    q, k, v = x[0].chunk(3)
    added = x[1].chunk(3)
    q1, k1, v1, mlp = x[2].split([D, D, D, 4 * D])
    shift, scale = x[4].chunk(2)
    attn, single = "transformer_blocks.3.attn.", "single_transformer_blocks.11."
    return {
        f"{attn}to_q.weight": q, f"{attn}to_k.weight": k, f"{attn}to_v.weight": v,
        f"{attn}add_q_proj.weight": added[0], f"{attn}add_k_proj.weight": added[1],
        f"{attn}add_v_proj.weight": added[2],
        f"{single}attn.to_q.weight": q1, f"{single}attn.to_k.weight": k1,
        f"{single}attn.to_v.weight": v1, f"{single}proj_mlp.weight": mlp,
        f"{single}proj_out.weight": x[3],
        "norm_out.linear.weight": torch.cat([scale, shift]),
        f"{attn}norm_q.weight": x[5],
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["", UNET])
def test_modules_of_diffusers_on_fused_tensors(prefix: str, tmp_path: Path) -> None:
    base = flux(prefix)
    apart = flux_of_diffusers(base)
    left = "transformer_blocks.3.attn.to_k"  # whose rows stay as they are
    modules = {
        f"transformer.{n.removesuffix('.weight')}": (t.shape[0], t.shape[1])
        for n, t in apart.items()
        if t.dim() == 2 and n != f"{left}.weight"
    }
    factors = Factors(2, "diffusers", modules)
    got = flux_of_diffusers(applied(base, factors, tmp_path))
    changes = {f"{m.partition('.')[2]}.weight": x for m, x in factors.deltas.items()}
    check(got, apart, changes)


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_modules_of_fused_tensors_on_diffusers_names(style: str, tmp_path: Path) -> None:
    fused = flux()
    prefix = "lora_unet_" if style == "kohya" else "diffusion_model."
    modules = {}
    for name, w in list(fused.items())[:5]:
        stem = name.removesuffix(".weight")
        modules[prefix + (stem.replace(".", "_") if style == "kohya" else stem)] = tuple(w.shape)
    factors = Factors(3, style, modules)
    moved = {n: w + d for (n, w), d in zip(fused.items(), factors.deltas.values(), strict=False)}
    base = flux_of_diffusers(fused)
    want = flux_of_diffusers(fused | moved)
    got = applied(base, factors, tmp_path)
    check(got, base, {n: want[n] - base[n] for n in base if "norm_q" not in n})


def test_rows_are_read_in_any_piece(tmp_path: Path) -> None:
    """Pieces of a fused tensor are pieces of the whole one; what they take is counted."""
    base = weights({"double_blocks.0.img_attn.qkv.weight": (3 * 512, 600)})
    (name,) = base
    modules = {f"transformer.transformer_blocks.0.attn.to_{x}": (512, 600) for x in "qv"}
    factors = Factors(4, "diffusers", modules)
    got = applied(base, factors, tmp_path)
    q, v = factors.deltas.values()
    check(got, base, {name: torch.cat([q, torch.zeros(512, 600), v])})
    whole = got[name].numpy().tobytes()
    with open_model(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors") as model:
        assert model.overhead > 3 * 512 * 5 * 4  # B, of both ranks
        for start, count in ((0, 4), (4 * 511 * 600 - 8, 4000), (1 << 20, 1 << 20)):
            data = bytearray(count)
            model.read_into(name, data, start, count)
            assert bytes(data) == whole[start : start + count]


@pytest.mark.parametrize(("to", "module"), [("q", "to_q"), ("out", "to_out.0")])
def test_old_attention_processors(to: str, module: str, tmp_path: Path) -> None:
    attn = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    base = weights({f"{attn}{module}.weight": (D, D)})
    factors = Factors(5, "diffusers", {"x": (D, D)})
    a, b = factors.tensors.values()
    factors.tensors = {
        f"unet.{attn}processor.to_{to}_lora.{side}.weight": t
        for side, t in (("down", a), ("up", b))
    }
    got = applied(base, factors, tmp_path)
    check(got, base, {f"{attn}{module}.weight": factors.deltas["x"]})


@pytest.mark.parametrize("known", [True, False])
def test_what_the_file_has_is_applied_and_the_rest_said(known: bool, tmp_path: Path) -> None:
    inner = f"down_blocks.0.attentions.0.{INNER}" if known else "layers.0.mixer.q"
    base = weights({f"{inner}.weight": (D, D)})
    text = f"text_encoder.{LAYER}mlp.fc1"
    part = "unet" if known else "transformer"
    factors = Factors(6, "diffusers", {f"{part}.{inner}": (D, D), text: (D, D)})
    save_file(base, tmp_path / "base.safetensors")
    factors.save(tmp_path / "adapter.safetensors")
    report = merged(tmp_path)
    (said,) = (w for w in report.warnings if "left out" in w)
    assert "1 of its modules are for the part 'text" in said and text in said
    got = load_file(tmp_path / "out.safetensors")
    check(got, base, {f"{inner}.weight": factors.deltas[f"{part}.{inner}"]})


def refusal(base: dict[str, Tensor], factors: Factors, folder: Path) -> str:
    with pytest.raises(mf.CheckpointError) as caught:
        applied(base, factors, folder)
    return str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    unet = weights({f"down_blocks.0.attentions.0.{INNER}.weight": (D, D)})
    wrong = Factors(7, "diffusers", {"transformer.single_transformer_blocks.0.attn.to_q": (D, D)})
    said = refusal(unet, wrong, tmp_path)
    assert "as " in said and "Stable Diffusion 1" in said and "got those of Flux" in said
    assert "Name the model that the adapter was trained on" in said
    lacking = Factors(7, "diffusers", {f"unet.down_blocks.1.attentions.0.{INNER}": (D, D)})
    assert "expected its weight in the unet of" in refusal(unet, lacking, tmp_path)
    only_text = Factors(7, "diffusers", {f"text_encoder.{LAYER}mlp.fc1": (D, D)})
    assert "expected modules for a part of" in refusal(unet, only_text, tmp_path)
    unknown = Factors(7, "diffusers", {"unet.nobody.knows.it": (D, D)})
    said = refusal(unet, unknown, tmp_path)
    assert "convention that is not known here" in said and "Name the model" not in said
    uneven = Factors(7, "diffusers", {"diffusion_model.double_blocks.0.img_attn.qkv": (4, D)})
    whole = weights({f"transformer_blocks.0.attn.to_{x}.weight": (D, D) for x in "qkv"}
                    | {"single_transformer_blocks.0.norm.linear.weight": (D, D)})  # fmt: skip
    assert "expected a multiple of 3 rows of B" in refusal(whole, uneven, tmp_path)


def test_of_one_model_nothing_is_left_out(tmp_path: Path) -> None:
    """``transformer.`` is the language model of GPT-2, no part of a pipeline."""
    base = weights({"transformer.h.0.mlp.c_fc.weight": (D, D), "transformer.wte.weight": (9, D)})
    save_file(base, tmp_path / "base.safetensors")
    lora = draw_lora(0, {"transformer.h.0.mlp.c_fc": (D, D), "score": (3, D)})
    model = f"{tmp_path}/base.safetensors+{write_peft(tmp_path / 'p', lora)}"
    config = {"merge_method": "passthrough", "models": [{"model": model}]}
    with pytest.raises(mf.CheckpointError, match="module 'score'"):
        mf.merge_checkpoints(config, tmp_path / "out.safetensors")


def test_a_name_of_two_parts_goes_by_its_width_or_is_refused(tmp_path: Path) -> None:
    """Of one text encoder or the other: the adapter has no prefix."""
    for width, ok in ((2 * D, True), (D, False)):
        base = weights({
            f"{TE1}mlp.fc1.weight": (D, D),
            f"{TE2}mlp.c_fc.weight": (width, width),
        })  # fmt: skip
        factors = Factors(8, "diffusers", {f"{LAYER}mlp.fc1": (D, D)})
        if ok:
            changes = {f"{TE1}mlp.fc1.weight": factors.deltas[f"{LAYER}mlp.fc1"]}
            check(applied(base, factors, tmp_path), base, changes)
            (tmp_path / "out.safetensors").unlink()
        else:
            said = refusal(base, factors, tmp_path)
            assert f"'{TE1}mlp.fc1.weight'" in said and f"'{TE2}mlp.c_fc.weight'" in said


def test_text_encoders_in_folders_of_their_own(tmp_path: Path) -> None:
    """Both have the same names: which one a file is, its width says."""
    shapes = {"text_encoder.": (D, D), "text_encoder_2.": (2 * D, 2 * D)}
    factors = Factors(8, "diffusers", {f"{p}{LAYER}mlp.fc1": s for p, s in shapes.items()})
    for (own, shape), other in zip(shapes.items(), reversed(shapes), strict=True):
        base = weights({f"{LAYER}mlp.fc1.weight": shape})
        save_file(base, tmp_path / "base.safetensors")
        factors.save(tmp_path / "adapter.safetensors")
        report = merged(tmp_path)
        got = load_file(tmp_path / "out.safetensors")
        check(got, base, {f"{LAYER}mlp.fc1.weight": factors.deltas[f"{own}{LAYER}mlp.fc1"]})
        assert any(f"first '{other}{LAYER}mlp.fc1'" in w for w in report.warnings)
        (tmp_path / "out.safetensors").unlink()


def delta(tensors: dict[str, Tensor], module: str, style: str) -> Tensor:
    down, up = (tensors[module + key] for key in KEYS[style])
    alpha = tensors.get(f"{module}.alpha")
    return (1.0 if alpha is None else float(alpha) / down.shape[0]) * up @ down


def joined(first: Factors, second: Factors, folder: Path, **options: Any) -> Any:
    paths = [first.save(folder / "a.safetensors"), second.save(folder / "b.safetensors")]
    options = {"method": "task_arithmetic"} | options
    report = mf.merge_adapters(paths, folder / "ab.safetensors", **options)
    return load_file(folder / "ab.safetensors"), report


def test_adapters_in_unlike_conventions_meet(tmp_path: Path) -> None:
    """kohya's, diffusers' and old names of one module, each first once."""
    module = f"down_blocks.1.attentions.0.{INNER}"
    names = {
        "kohya": "lora_unet_" + module.replace(".", "_"),
        "diffusers": f"unet.{module}",
        "ldm": "lora_unet_input_blocks_4_1_" + INNER.replace(".", "_"),
    }
    made = {
        n: Factors(i, "kohya" if n == "ldm" else n, {m: (D, D)})
        for i, (n, m) in enumerate(names.items())
    }
    for a in names:
        for b in names:
            if a != b:
                found, report = joined(made[a], made[b], tmp_path)
                style = made[a].style
                assert {k.removesuffix(".alpha") for k in found if ".lora" not in k} <= {names[a]}
                want = made[a].deltas[names[a]] + made[b].deltas[names[b]]
                torch.testing.assert_close(delta(found, names[a], style), want)
                assert [m.name for m in report.modules] == [names[a]]
                assert any("read and written in the names of" in w for w in report.warnings)
                (tmp_path / "ab.safetensors").unlink()


@pytest.mark.parametrize("peft_first", [True, False])
def test_folders_of_peft_meet_files(peft_first: bool, tmp_path: Path) -> None:
    """The configuration of the result names the modules of both."""
    module = f"down_blocks.1.attentions.0.{INNER}"
    other = "mid_block.attentions.0.proj_in"
    lora = draw_lora(0, {module: (D, D)})
    flat = {"lora_unet_" + m.replace(".", "_"): (D, D) for m in (module, other)}
    kohya = Factors(1, "kohya", flat)
    paths = [write_peft(tmp_path / "p", lora), kohya.save(tmp_path / "k.safetensors")]
    out = tmp_path / ("out" if peft_first else "out.safetensors")
    order = paths if peft_first else paths[::-1]
    mf.merge_adapters(order, out, "task_arithmetic", base_model="base")
    first, second = kohya.deltas.values()
    want = {module: lora.delta(module, (D, D)).float() + first, other: second}
    if peft_first:
        config = json.loads((out / "adapter_config.json").read_text())
        assert all(re.fullmatch(config["target_modules"], m) for m in want)
        assert config["r"] == config["lora_alpha"]
        found = load_file(out / "adapter_model.safetensors")
        names = {m: f"base_model.model.{m}" for m in want}
    else:
        found, names = load_file(out), dict(zip(want, flat, strict=True))
    for name, change in want.items():
        style = "diffusers" if peft_first else "kohya"
        torch.testing.assert_close(delta(found, names[name], style), change)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("fused_first", [True, False])
def test_fused_and_single_adapters_meet(method: str, fused_first: bool, tmp_path: Path) -> None:
    fused = "lora_unet_single_blocks_0_linear1"
    block = "transformer.single_transformer_blocks.0."
    one = Factors(0, "kohya", {fused: (7 * D, D)})
    several = Factors(1, "diffusers", {f"{block}attn.to_k": (D, D), f"{block}proj_mlp": (4 * D, D)})
    k, mlp = several.deltas.values()
    apart = torch.cat([torch.zeros(D, D), k, torch.zeros(D, D), mlp])
    pair = (one, several) if fused_first else (several, one)
    taus = [one.deltas[fused], apart] if fused_first else [apart, one.deltas[fused]]
    options = {} if method == "task_arithmetic" else {"density": 1.0}
    rank = {"rank": D} | options if options else {}
    found, _ = joined(*pair, tmp_path, method=method, **rank)
    want = mf.merge_task_vectors([{"w": x} for x in taus], method=method, **options)["w"]
    if fused_first:
        torch.testing.assert_close(delta(found, fused, "kohya"), want, rtol=1e-4, atol=1e-4)
        return
    parts = want.split([D, D, D, 4 * D])
    for name, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), parts, strict=True):
        torch.testing.assert_close(
            delta(found, block + name, "diffusers"), part, rtol=1e-4, atol=1e-4
        )


def test_a_second_text_encoder_keeps_its_part(tmp_path: Path) -> None:
    """A part that the first adapter has nothing of is named by the first one's convention."""
    first = Factors(0, "kohya", {"lora_unet_input_blocks_4_1_proj_in": (D, D)})
    second = Factors(1, "diffusers", {f"text_encoder_2.{LAYER}mlp.fc1": (D, D)})
    found, report = joined(first, second, tmp_path)
    name = "lora_te2_text_model_encoder_layers_1_mlp_fc1"
    torch.testing.assert_close(delta(found, name, "kohya"), *second.deltas.values())
    assert f"{name}.alpha" in found
    assert len(report.modules) == 2


def test_families_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    """An upsampler's place among LDM's blocks hangs on the model."""
    first = Factors(0, "kohya", {"lora_unet_input_blocks_4_1_proj_in": (D, D)})
    second = Factors(1, "diffusers", {"unet.up_blocks.0.upsamplers.0.conv": (D, D)})
    with pytest.raises(mf.CheckpointError, match=r"Stable Diffusion 1 and that of .* XL"):
        joined(first, second, tmp_path)


def test_unlike_models_are_refused(tmp_path: Path) -> None:
    first = Factors(0, "kohya", {"lora_unet_double_blocks_0_img_attn_qkv": (3 * D, D)})
    second = Factors(1, "diffusers", {f"unet.down_blocks.0.attentions.0.{INNER}": (D, D)})
    with pytest.raises(mf.CheckpointError, match=r"in kohya's naming as .* in diffusers's naming"):
        joined(first, second, tmp_path)


@pytest.mark.parametrize("alphas", [False, True])
def test_mixed_ranks_say_their_settings(alphas: bool, tmp_path: Path) -> None:
    """Diffusers before its fix takes the rank of the first module for every α, unless told."""
    block = "transformer.transformer_blocks.0.attn."
    first = Factors(0, "diffusers", {f"{block}to_q": (D, D), f"{block}to_k": (D, D)})
    second = Factors(1, "diffusers", {f"{block}to_q": (D, D), "text_encoder.x": (D, D)})
    if alphas:
        first.tensors[f"{block}to_q.alpha"] = torch.tensor(2.0)
    found, _ = joined(first, second, tmp_path)
    with safe_open(tmp_path / "ab.safetensors", "pt") as file:
        header = file.metadata()
    if alphas:
        assert "lora_adapter_metadata" not in header
        assert {k: float(v) for k, v in found.items() if k.endswith(".alpha")} == {
            f"{block}to_q.alpha": 4.0, f"{block}to_k.alpha": 3.0, "text_encoder.x.alpha": 3.0,
        }  # fmt: skip
        return
    inner = "transformer_blocks.0.attn.to_"
    assert json.loads(header["lora_adapter_metadata"]) == {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.rank_pattern": {f"{inner}k": 3},
        "transformer.alpha_pattern": {f"{inner}k": 3},
        "transformer.target_modules": [f"{inner}k", f"{inner}q"],
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 3,
        "text_encoder.rank_pattern": {},
        "text_encoder.alpha_pattern": {},
        "text_encoder.target_modules": ["x"],
    }


def test_equal_ranks_need_no_settings(tmp_path: Path) -> None:
    pair = [Factors(k, "diffusers", {"transformer.x": (D, D)}) for k in range(2)]
    joined(*pair, tmp_path)
    with safe_open(tmp_path / "ab.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_kinds_of_numbers_that_differ(tmp_path: Path) -> None:
    """Rows of factors in bfloat16 and of unlike scalings, on a fused tensor: float32, each scaled
    as it would be by itself."""
    base = weights({"double_blocks.0.img_attn.qkv.weight": (3 * D, D)})
    names = [f"lora_unet_transformer_blocks_0_attn_to_{x}" for x in "qkv"]
    factors = Factors(3, "kohya", dict.fromkeys(names, (D, D)))
    factors.tensors = {
        n: t.bfloat16() if "alpha" not in n and "to_q" in n else t
        for n, t in factors.tensors.items()
    }
    changes = [delta({n: t.float() for n, t in factors.tensors.items()}, n, "kohya") for n in names]
    check(applied(base, factors, tmp_path), base, {next(iter(base)): torch.cat(changes)})

"""The original names of each map, and the converter of diffusers that reads them.

A map is made from one or several models: shapes of the original tensors by name, what converts
them, and name → rows of the model that must come out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils as converters
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


class Model(NamedTuple):
    """What goes in, what converts it, the rows that come out; and the prefix that original names
    have in a file of the whole pipeline."""

    shapes: Shapes
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    rows: dict[str, int]
    prefix: str = ""


def built(make: Callable[[], Any]) -> Mapping[str, Tensor]:
    """The parameters of a model, without weights."""
    with torch.device("meta"):
        state = make().state_dict()
    return {n: t for n, t in state.items() if not n.endswith("position_ids")}


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> Shapes:
    """Two columns of every tensor, under its original name."""
    return {rename(n): (t.shape[0], 2) if t.dim() > 1 else tuple(t.shape) for n, t in state.items()}


def by_rules(rules: Mapping[str, str | Callable[[re.Match[str]], str]], name: str) -> str:
    for pattern, new in rules.items():
        name = re.sub(pattern, new, name)
    return name


def whole(
    state: Mapping[str, Tensor],
    rename: Callable[[str], str] = lambda n: n,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
) -> Model:
    return Model(renamed(state, rename), convert, {n: t.shape[0] for n, t in state.items()})


def _third(found: re.Match[str]) -> int:
    """The place of a layer among blocks of three."""
    return 3 * int(found[1]) + int(found[2])


_RESNET = {
    r"(resnets\.\d+)\.norm1\b": r"\1.in_layers.0",
    r"(resnets\.\d+)\.conv1\b": r"\1.in_layers.2",
    r"(resnets\.\d+)\.time_emb_proj\b": r"\1.emb_layers.1",
    r"(resnets\.\d+)\.norm2\b": r"\1.out_layers.0",
    r"(resnets\.\d+)\.conv2\b": r"\1.out_layers.3",
    r"(resnets\.\d+)\.conv_shortcut\b": r"\1.skip_connection",
}
_UNET = {
    **_RESNET,
    r"^conv_in\b": "input_blocks.0.0",
    r"^time_embedding\.linear_1\b": "time_embed.0",
    r"^time_embedding\.linear_2\b": "time_embed.2",
    r"^add_embedding\.linear_1\b": "label_emb.0.0",
    r"^add_embedding\.linear_2\b": "label_emb.0.2",
    r"^conv_norm_out\b": "out.0",
    r"^conv_out\b": "out.2",
    r"^down_blocks\.(\d+)\.resnets\.(\d+)": lambda m: f"input_blocks.{1 + _third(m)}.0",
    r"^down_blocks\.(\d+)\.attentions\.(\d+)": lambda m: f"input_blocks.{1 + _third(m)}.1",
    r"^down_blocks\.(\d+)\.down\w+\.0\.conv": lambda m: f"input_blocks.{3 * (int(m[1]) + 1)}.0.op",
    r"^mid_block\.resnets\.(\d+)": lambda m: f"middle_block.{2 * int(m[1])}",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^up_blocks\.(\d+)\.resnets\.(\d+)": lambda m: f"output_blocks.{_third(m)}.0",
    r"^up_blocks\.(\d+)\.attentions\.(\d+)": lambda m: f"output_blocks.{_third(m)}.1",
}  # fmt: skip


def unet(**config: Any) -> Iterator[Model]:
    state = built(lambda: diffusers.UNet2DConditionModel(**config))

    def rename(name: str) -> str:
        found = re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv(.*)", name)
        if found is None:
            return converters.LDM_UNET_KEY + by_rules(_UNET, name)
        after = any(n.startswith(f"up_blocks.{found[1]}.attentions.") for n in state)
        place = f"{3 * int(found[1]) + 2}.{1 + after}"
        return f"{converters.LDM_UNET_KEY}output_blocks.{place}.conv{found[2]}"

    config["layers_per_block"] = 2
    convert = partial(converters.convert_ldm_unet_checkpoint, config=config)
    yield whole(state, rename, convert)._replace(prefix=converters.LDM_UNET_KEY)


def unet_1() -> Iterator[Model]:
    yield from unet(cross_attention_dim=768)


def unet_xl() -> Iterator[Model]:
    yield from unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10],
        cross_attention_dim=2048, attention_head_dim=[5, 10, 20], use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


_VAE = {
    r"\bresnets\.(\d+)\.": r"block.\1.",
    r"\bconv_shortcut\b": "nin_shortcut",
    r"\bdown_blocks\b": "down",
    r"\bdownsamplers\.0\b": "downsample",
    r"\bup_blocks\.(\d)": lambda m: f"up.{3 - int(m[1])}",
    r"\bupsamplers\.0\b": "upsample",
    r"mid_block\.block\.(\d)": lambda m: f"mid.block_{int(m[1]) + 1}",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"group_norm": "norm",
    r"to_(q|k|v)\b": r"\1",
    r"to_out\.0": "proj_out",
    r"conv_norm_out": "norm_out",
}


def vae() -> Iterator[Model]:
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    state = built(
        lambda: diffusers.AutoencoderKL(
            down_block_types=blocks[0], up_block_types=blocks[1], layers_per_block=2,
            block_out_channels=(128, 256, 512, 512),
        )
    )  # fmt: skip
    config = {"down_block_types": blocks[0], "up_block_types": blocks[1]}
    convert = partial(converters.convert_ldm_vae_checkpoint, config=config)
    prefix = converters.LDM_VAE_KEYS[0]
    model = whole(state, lambda n: prefix + by_rules(_VAE, n), convert)._replace(prefix=prefix)
    for name, shape in model.shapes.items():  # a convolution there, a matrix in diffusers
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            model.shapes[name] = (*shape, 1, 1)
    yield model


def clip() -> Iterator[Model]:
    config = transformers.CLIPTextConfig(num_hidden_layers=2)
    yield identity(built(lambda: transformers.CLIPTextModel(config)), "text_model.")


def t5() -> Iterator[Model]:
    config = transformers.T5Config(num_layers=2, feed_forward_proj="gated-gelu", vocab_size=8)
    state = built(lambda: transformers.T5EncoderModel(config))
    yield identity({n: t for n, t in state.items() if not n.startswith("encoder.embed")})


def identity(state: Mapping[str, Tensor], prefix: str = "") -> Model:
    """Names that are the same in all files; transformers leaves out the prefix since 5."""
    return whole({n if n.startswith(prefix) else prefix + n: t for n, t in state.items()})


_OPEN_CLIP = {
    "transformer.resblocks.*.attn.in_proj_weight": (3, 2),
    "transformer.resblocks.*.attn.in_proj_bias": (3,),
    "transformer.resblocks.*.attn.out_proj": 1,
    "transformer.resblocks.*.ln_1": 0,
    "transformer.resblocks.*.ln_2": 0,
    "transformer.resblocks.*.mlp.c_fc": 4,
    "transformer.resblocks.*.mlp.c_proj": 1,
    "ln_final": 0,
}


def listed(layers: Mapping[str, Any], width: int) -> Shapes:
    """Shapes by name: how many times the width the rows of a linear layer's weight and bias are, 0
    of a norm, or the shape of a parameter, its rows in widths."""
    shapes: Shapes = {}
    for pattern, rows in layers.items():
        for n in ("0", "1") if "*" in pattern else ("",):
            name = pattern.replace("*", n)
            if isinstance(rows, tuple):
                shapes[name] = (int(rows[0] * width), *rows[1:])
            else:
                shapes[f"{name}.weight"] = (rows * width, 2) if rows else (width,)
                shapes[f"{name}.bias"] = (max(1, rows) * width,)
    return shapes


def open_clip() -> Iterator[Model]:
    config = transformers.CLIPTextConfig(
        num_hidden_layers=2, hidden_size=1280, intermediate_size=5120, projection_dim=1280,
        num_attention_heads=20,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection
    state = built(lambda: model(config))
    prefix = "conditioner.embedders.1.model."
    shapes = listed(_OPEN_CLIP, 1280) | {
        "token_embedding.weight": (config.vocab_size, 2),
        "positional_embedding": (config.max_position_embeddings, 2),
        "text_projection": (1280, 2),
    }
    rows = {
        n if n.startswith("text_") else f"text_model.{n}": t.shape[0] for n, t in state.items()
    } | {"text_projection.weight": 2}  # turned, two columns of it

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return converters.convert_open_clip_checkpoint(None, tensors, prefix=prefix)

    yield Model({prefix + n: shape for n, shape in shapes.items()}, convert, rows, prefix)


_FLUX = {
    "img_in": 1,
    "txt_in": 1,
    "time_in.in_layer": 1,
    "time_in.out_layer": 1,
    "vector_in.in_layer": 1,
    "vector_in.out_layer": 1,
    "guidance_in.in_layer": 1,
    "guidance_in.out_layer": 1,
    **{
        f"double_blocks.*.{stream}_{name}": rows
        for stream in ("img", "txt")
        for name, rows in {
            "mod.lin": 6,
            "attn.qkv": 3,
            "attn.proj": 1,
            "attn.norm.query_norm.scale": (1 / 24,),
            "attn.norm.key_norm.scale": (1 / 24,),
            "mlp.0": 4,
            "mlp.2": 1,
        }.items()
    },
    "single_blocks.*.modulation.lin": 3,
    "single_blocks.*.linear1": 7,
    "single_blocks.*.linear2": 1,
    "single_blocks.*.norm.query_norm.scale": (1 / 24,),
    "single_blocks.*.norm.key_norm.scale": (1 / 24,),
    "final_layer.linear.weight": (1 / 48, 2),
    "final_layer.linear.bias": (1 / 48,),
    "final_layer.adaLN_modulation.1": 2,
}


def flux() -> Iterator[Model]:
    config = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}
    state = built(lambda: diffusers.FluxTransformer2DModel(**config))
    convert = converters.convert_flux_transformer_checkpoint_to_diffusers
    yield Model(listed(_FLUX, 3072), convert, {n: t.shape[0] for n, t in state.items()})


_WAN = {
    r"^condition_embedder\.time_embedder\.linear_1\b": "time_embedding.0",
    r"^condition_embedder\.time_embedder\.linear_2\b": "time_embedding.2",
    r"^condition_embedder\.text_embedder\.linear_1\b": "text_embedding.0",
    r"^condition_embedder\.text_embedder\.linear_2\b": "text_embedding.2",
    r"^condition_embedder\.time_proj\b": "time_projection.1",
    r"^condition_embedder\.image_embedder\.norm1\b": "img_emb.proj.0",
    r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\b": "img_emb.proj.1",
    r"^condition_embedder\.image_embedder\.ff\.net\.2\b": "img_emb.proj.3",
    r"^condition_embedder\.image_embedder\.norm2\b": "img_emb.proj.4",
    r"^scale_shift_table$": "head.modulation",
    r"\.scale_shift_table$": ".modulation",
    r"^proj_out\b": "head.head",
    r"(vace_blocks\.\d+)\.proj_in\b": r"\1.before_proj",
    r"(vace_blocks\.\d+)\.proj_out\b": r"\1.after_proj",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_(q|k|v)\.": r".\1.",
    r"\.to_out\.0\.": ".o.",
    r"\.add_(k|v)_proj\.": r".\1_img.",
    r"\.norm_added_k\.": ".norm_k_img.",
    r"\.norm2\.": ".norm3.",
    r"\.ffn\.net\.0\.proj\.": ".ffn.0.",
    r"\.ffn\.net\.2\.": ".ffn.2.",
}


def wan() -> Iterator[Model]:
    image = {"image_dim": 1280, "added_kv_proj_dim": 5120, "num_layers": 2}
    for make in (
        lambda: diffusers.WanTransformer3DModel(**image),
        lambda: diffusers.WanVACETransformer3DModel(num_layers=2, vace_layers=[0, 1]),
    ):
        convert = converters.convert_wan_transformer_to_diffusers
        yield whole(built(make), partial(by_rules, _WAN), convert)


def qwen_image() -> Iterator[Model]:
    yield whole(built(lambda: diffusers.QwenImageTransformer2DModel(num_layers=2)))


PARTS: dict[str, Callable[[], Iterator[Model]]] = {
    "unet_1": unet_1,
    "unet_xl": unet_xl,
    "vae": vae,
    "clip": clip,
    "open_clip": open_clip,
    "t5": t5,
    "flux": flux,
    "wan": wan,
    "qwen_image": qwen_image,
}

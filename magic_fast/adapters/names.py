"""Keys of adapter files, in the conventions that are in use.

==========  =====================================================  =====================
style       keys of a module                                       scaling
==========  =====================================================  =====================
peft        ``base_model.model.M.lora_A.weight``, ``….lora_B.…``,  ``adapter_config.json``
            ``….lora_embedding_A``, ``….ia3_l``
kohya       ``lora_unet_M.lora_down.weight``, ``….lora_up.weight``  ``lora_unet_M.alpha``
LyCORIS     ``lycoris_M.hada_w1_a``, ``.lokr_w1``, ``.dora_scale``,  ``lycoris_M.alpha``
            ``.diff``, ``.w_norm``, kohya's else
diffusers   ``unet.M.lora_A.weight`` or ``….lora.down.weight``     header, or ``….alpha``
==========  =====================================================  =====================
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

PEFT_PREFIX = "base_model.model."


class Role(str, Enum):
    """What a tensor of an adapter is to its module."""

    DOWN = "down"  # A
    UP = "up"  # B
    ALPHA = "alpha"
    VECTOR = "vector"  # of IA3
    DORA = "dora"
    BIAS = "bias"  # of B
    PART = "part"  # of a form of forms.py
    FOREIGN = "foreign"  # a factor of another decomposition
    WHOLE = "whole"  # a tensor of the model itself, trained beside the factors
    ORIGINAL = "original"  # the model's own, before it was trained whole


@dataclass(frozen=True)
class Key:
    """A parsed key: ``base_model.model.fc1.lora_A.weight`` is the DOWN of module ``fc1``."""

    module: str
    role: Role
    embedding: bool = False
    part: str = field(default="", repr=False)  # of a form


_LORA = {
    ".lora_A.weight": Role.DOWN,
    ".lora_B.weight": Role.UP,
    ".lora_down.weight": Role.DOWN,
    ".lora_up.weight": Role.UP,
    ".lora.down.weight": Role.DOWN,
    ".lora.up.weight": Role.UP,
    ".lora_linear_layer.down.weight": Role.DOWN,  # diffusers' text encoders
    ".lora_linear_layer.up.weight": Role.UP,
    "_lora.down.weight": Role.DOWN,  # diffusers' attention processors, until 0.22
    "_lora.up.weight": Role.UP,
    ".alpha": Role.ALPHA,
    ".ia3_l": Role.VECTOR,
    ".lora_magnitude_vector": Role.DORA,
    ".lora_magnitude_vector.weight": Role.DORA,
    ".dora_scale": Role.DORA,
    ".lora_B.bias": Role.BIAS,
}
_EMBEDDING = {".lora_embedding_A": Role.DOWN, ".lora_embedding_B": Role.UP}
_PART = re.compile(
    r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|lora_mid|diff(?:_[bm])?|[wb]_norm)"
    r"(?:\.weight)?$"
)
_PART_NAMES = {"lora_mid": "mid", "w_norm": "diff", "b_norm": "diff_b"}
# OFT, AdaLoRA's singular values and others that nobody can add up
_FOREIGN = re.compile(r"\.(hada_|lokr_|oft_|boft_|glora_|vera_lambda|lora_E\b|lora_ga|norm_)")

_SAVED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")


_FACTOR = re.compile(
    r"(?:^|\.)(?:lora_(?:[ABE]|embedding_[AB]|down|up|mid|magnitude_vector)|dora_scale"
    r"|(?:hada|lokr)_[wt]\w*|vera_lambda_\w+|b?oft_[A-Zrs]\w*)(?:\.|$)"
)


def is_factor(name: str) -> bool:
    """Whether a tensor of a live model or of an adapter's file is a factor of an adapter, which
    says nothing without the others. IA3's vectors do.

    >>> is_factor("base_model.model.q.lora_A.default.weight"), is_factor("model.q.weight")
    (True, False)
    """
    return _FACTOR.search(name) is not None


def parse_key(key: str) -> Key:
    """What a key of an adapter file stands for.

    >>> parse_key("base_model.model.fc1.lora_A.weight")
    Key(module='fc1', role=<Role.DOWN: 'down'>, embedding=False)
    """
    name = key.removeprefix(PEFT_PREFIX).replace("_orig_mod.", "")  # of torch.compile
    for suffix, role in _EMBEDDING.items():
        if name.endswith(suffix):
            return Key(name.removesuffix(suffix), role, embedding=True)
    for suffix, role in _LORA.items():
        if name.endswith(suffix):
            module = name.removesuffix(suffix)
            return Key(_processed(module) if suffix[0] == "_" else module, role)
    if part := _PART.search(name):
        return Key(name[: part.start()], Role.PART, part=_PART_NAMES.get(part[1], part[1]))
    if _FOREIGN.search(name):
        return Key(name, Role.FOREIGN)
    if ".original_module." in name:
        return Key(name, Role.ORIGINAL)
    return Key(_SAVED.sub(".", name), Role.WHOLE)


def _processed(name: str) -> str:
    """The module that an attention processor had the factors of.

    >>> _processed("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    owner, _, leaf = name.replace(".processor.", ".").rpartition(".")
    if owner.endswith(".self_attn"):  # of a text encoder
        return f"{owner}.{leaf.removeprefix('to_')}_proj"
    return f"{owner}.to_out.0" if leaf == "to_out" else f"{owner}.{leaf}"


def style_of(keys: Iterable[str]) -> str:
    """The convention of a file without a configuration: ``kohya`` or ``diffusers``."""
    own = [k for k in keys if k.startswith(("lora_", "lycoris_"))]
    kohya = any(".lora_down." in k or parse_key(k).role is Role.PART for k in own)
    return "kohya" if kohya else "diffusers"


#: What a file says of the part of a pipeline that a module is of; a second text encoder is not to
#: be found by how a name ends.
_PARTS = {
    "kohya": re.compile(r"^(lora_(unet|transformer|te1?)|lycoris)_"),
    "diffusers": re.compile(r"^(unet|transformer|diffusion_model|text_encoder)\."),
}


def weight_names(module: str, style: str, names: Iterable[str]) -> list[str]:
    """The tensors of a checkpoint that a module's weight may be, best first: the exact name; else
    those that differ by leading parts, such as the ``transformer.`` that GPT-2's checkpoints lack.
    kohya writes dots as underscores.

    >>> weight_names("transformer.h.0.mlp.c_fc", "peft", ["h.0.mlp.c_fc.weight", "h.0.ln.weight"])
    ['h.0.mlp.c_fc.weight']
    """
    names = [n for n in names if n.endswith(".weight")]
    wanted = _flat(module).removeprefix("lycoris_") if style == "kohya" else module
    stems = {n: _flat(n[:-7]) if style == "kohya" else n[:-7] for n in names}
    if style != "peft":
        wanted = _PARTS[style].sub("", wanted)
    separator = "_" if style == "kohya" else "."
    exact = [n for n, stem in stems.items() if stem in (module, wanted)]
    longer = [n for n, stem in stems.items() if stem.endswith(separator + wanted)]
    shorter = [n for n, stem in stems.items() if wanted.endswith(separator + stem)]
    return exact or longer or sorted(shorter, key=len, reverse=True)[:1]


def _flat(name: str) -> str:
    return name.replace(".", "_")

"""Quantised weights in a checkpoint: which tensors hold codes or the scales that belong to them,
and by which scheme they were made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from magic_fast.models.roles import Kind, Role, Tensors

#: Names that only codes and their scales have.
QUANTISED_NAME = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|weight_format|qweight"
    r"|qzeros|scales|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|weight_shape"
    r"|input_scale)$|_(blocks|scales|scale_inv)$"
)
#: Other names of scales, which count beside codes only.
_BESIDE_CODES = re.compile(
    r"\.(biases|codebooks|zero|zeros|weight_scales|weight_g_idx|weight_global_scale"
    r"|input_global_scale|output_scale|_scale|_shift|meta|pre_quant_scale)$|_scale$"
)
_CODES = frozenset({"qweight", "weight_packed", "W_q", "codes", "_data"})
#: Dtypes that hold no codes, but where a tensor beside them says so.
NUMBERS = frozenset({"F64", "F32", "F16", "BF16", "BOOL"})
_STEM = re.compile(r"_(blocks|scales?|scale_inv)$")
_STATE = re.compile(r"\.(quant_state\..*|(nested_)?(absmax|quant_map))$")
_PARTS = ("text_config", "llm_config", "language_config")

#: ``quant_method`` of a configuration → as its makers write it.
_SCHEMES: Mapping[str, str] = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "modelopt": "ModelOpt",
    "quanto": "Quanto",
    "bitnet": "BitNet",
    "auto-round": "AutoRound",
}


@dataclass(frozen=True)
class Quantisation:
    """The quantised tensors of one model.

    Attributes:
        scheme: how they were made, in words: ``bitsandbytes 4-bit``.
        codes: tensors that stand for weights.
        tensors: all of them, scales too.
    """

    scheme: str
    codes: frozenset[str]
    tensors: frozenset[str]


def quantisation_of(config: Mapping[str, Any], tensors: Tensors) -> Quantisation | None:
    """The quantised tensors of a model, or None where all are numbers.

    Tensors decide: a configuration that speaks of a quantisation which no tensor shows, as after
    the weights were made numbers again, does not count.

    Args:
        config: the model's ``config.json``.
        tensors: name in the file → (shape, safetensors' dtype).

    >>> tensors = {"q.qweight": ((2, 16), "I32"), "q.scales": ((1, 16), "F16")}
    >>> config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    >>> quantisation_of(config, tensors).scheme
    'GPTQ 4-bit'
    """
    if all(dtype in NUMBERS for _, dtype in tensors.values()):
        return None
    codes = frozenset(_codes(tensors))
    if not codes:
        return None
    modules = {name.rpartition(".")[0] for name in codes} - {""}
    stems = {_STEM.sub("", name) for name in codes}
    found = {name for name in tensors if _belongs(name, codes, modules, stems)}
    scheme = _scheme(config, codes, found, tensors)
    return None if scheme is None else Quantisation(scheme, codes, frozenset(found))


def with_quantised(
    role_of: Callable[[str], Role], config: Mapping[str, Any], tensors: Tensors
) -> Callable[[str], Role]:
    """``role_of`` with codes and their scales as such, whatever stands in their place elsewhere."""
    found = quantisation_of(config, tensors)
    if found is None:
        return role_of
    names, doubt = found.tensors, f"{found.scheme} codes or scales"

    def quantised_or(name: str) -> Role:
        role = role_of(name)
        if name not in names:
            return role
        role = replace(role, kind=Kind.QUANTISED, units=None, units_doubt=doubt)
        return replace(role, vocabulary=None, words_doubt=None)

    return quantised_or


def _codes(tensors: Tensors) -> Iterable[str]:
    """Tensors that hold codes in place of weights."""
    for name, (shape, dtype) in tensors.items():
        if dtype in NUMBERS:
            continue
        state = _STATE.search(name)
        if state is not None:  # of bitsandbytes: its codes may be stored as numbers' bits
            if name[: state.start()] in tensors:
                yield name[: state.start()]
        elif dtype.startswith("F"):
            if "scale" not in name.rpartition(".")[2]:
                yield name
        elif name.rpartition(".")[2] in _CODES or (len(shape) > 1 and name.endswith("weight")):
            yield name
        elif name.endswith("_blocks") and f"{_STEM.sub('', name)}_scales" in tensors:
            yield name


def _belongs(name: str, codes: frozenset[str], modules: set[str], stems: set[str]) -> bool:
    if name in codes:
        return True
    if QUANTISED_NAME.search(name) is None and _BESIDE_CODES.search(name) is None:
        return False
    state = _STATE.search(name)
    owner = name[: state.start()] if state is not None else name
    return owner.rpartition(".")[0] in modules or _STEM.sub("", name) in stems


def _scheme(
    config: Mapping[str, Any], codes: frozenset[str], found: set[str], tensors: Tensors
) -> str | None:
    """The scheme by the configuration, else by what the tensors show; None where integers stand
    alone and nothing says what they are."""
    for part in (config, *(config.get(key) for key in _PARTS)):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        if method:
            return _SCHEMES.get(str(method), str(method)) + _bits(settings or {})
    return _shown(codes, found, tensors)


def _bits(settings: Mapping[str, Any]) -> str:
    for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if settings.get(key) is True:
            return f" {bits}-bit"
    bits = settings.get("bits", settings.get("w_bit"))
    return f" {bits}-bit" if isinstance(bits, int) else ""


def _shown(codes: frozenset[str], found: set[str], tensors: Tensors) -> str | None:
    leaves = {name.rpartition(".")[2] for name in found}
    dtypes = {tensors[name][1] for name in codes}
    if any(".quant_state.bitsandbytes" in name for name in found):
        return "bitsandbytes 4-bit"
    if "SCB" in leaves:
        return "bitsandbytes 8-bit"
    if "qweight" in leaves:
        return "GPTQ" if "g_idx" in leaves else "AWQ or GPTQ"
    if "weight_packed" in leaves:
        return "compressed-tensors"
    if any(name.endswith("_blocks") for name in found):
        return "MXFP4"
    if any(dtype.startswith("F8") for dtype in dtypes):
        return "FP8"
    if any(dtype.startswith(("F4", "F6")) for dtype in dtypes):
        return "FP4 or FP6"
    if "biases" in leaves and dtypes == {"U32"}:
        return "MLX"
    return "integer" if found > codes else None

"""From what a user names to an adapter: its modules, each with its factors and its scaling."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from magic_fast.adapters.names import PEFT_PREFIX, Key, Role, parse_key, style_of
from magic_fast.adapters.settings import (
    check_settings,
    header_settings,
    refuse_other_forms,
    refused,
    scaling_of,
)
from magic_fast.checkpoint import Checkpoint, InputFile, TensorInfo, open_checkpoint
from magic_fast.checkpoint.io_errors import reading
from magic_fast.checkpoint.strict_json import load_json_object
from magic_fast.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_BASE_KEY = "ss_base_model_version"  # in the header
METADATA_KEY = "lora_adapter_metadata"  # of diffusers, in the header: the configuration as JSON


@dataclass(frozen=True)
class AdapterModule:
    """What an adapter adds to one module.

    Attributes:
        name: of the module, as the adapter has it.
        down: A [r, in] (convolutions [r, in, kh, kw], embeddings [r, tokens]); of IA3 its vector.
        up: B [out, r] (convolutions [out, r, 1, 1], embeddings [width, r]); None for IA3.
        scaling: s; the weight changes by s·B·A.
        embedding: the weight changes by s·(B·A)ᵀ.
        weight: the tensor of the model that it changes, where its name is of another convention.
    """

    name: str
    down: TensorInfo
    up: TensorInfo | None
    scaling: float = 1.0
    embedding: bool = False
    weight: str | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + (0 if self.up is None else self.up.nbytes)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; only headers and the configuration were read.

    Attributes:
        path: as it was named.
        style: ``peft``, ``kohya`` or ``diffusers``.
        kind: ``lora`` or ``ia3``.
        checkpoint: its weights file.
        config: ``adapter_config.json``, or {}.
        modules: by name, in the order of the file.
        whole: tensor of the model → key of the adapter's file: what was trained whole beside the
            factors (``modules_to_save``, biases).
        files: identity of its files.
    """

    path: str
    style: str
    kind: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    modules: Mapping[str, AdapterModule]
    whole: Mapping[str, str]
    files: tuple[InputFile, ...]

    @property
    def base_model(self) -> str | None:
        """What it was trained on, as its configuration says, or kohya's header."""
        named = self.config.get("base_model_name_or_path")
        return named or self.checkpoint.metadata.get(KOHYA_BASE_KEY) or None

    def close(self) -> None:
        self.checkpoint.close()


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Open an adapter: a folder of PEFT (``adapter_config.json``, ``adapter_model.safetensors``),
    or a ``.safetensors`` file in kohya's or diffusers' naming.

    Raises:
        CheckpointError: nothing there, pickles, DoRA and other forms that are not s·B·A, a factor
            without its partner, shapes that do not fit.

    >>> open_adapter("adapters/french").modules["model.layers.0.mlp.up_proj"].rank  # doctest: +SKIP
    16
    """
    given = os.path.expanduser(os.fspath(path))
    if not os.path.lexists(given):
        raise CheckpointError(
            f"Adapter not found for {given}: expected PEFT's folder or a .safetensors file, got "
            "nothing there. Correct the path."
        )
    folder = given if os.path.isdir(given) else os.path.dirname(given)
    config_path = os.path.join(folder, CONFIG_NAME)
    named_file = os.path.basename(given) == WEIGHTS_NAME
    is_peft = (os.path.isdir(given) or named_file) and os.path.lexists(config_path)
    config: dict[str, Any] = {}
    files: tuple[InputFile, ...] = ()
    if is_peft:
        config, own = _read_config(config_path)
        refuse_other_forms(config, given)
        check_settings(config, config_path)
        files = (own,)
    checkpoint = open_checkpoint(_weights(given, is_peft))
    try:
        return _adapter(given, is_peft, checkpoint, config, files)
    except BaseException:
        checkpoint.close()
        raise


def _weights(given: str, is_peft: bool) -> str:
    """The file that holds the weights."""
    if not os.path.isdir(given):
        return given
    if (
        is_peft
        and os.path.lexists(os.path.join(given, "adapter_model.bin"))
        and not os.path.lexists(os.path.join(given, WEIGHTS_NAME))
    ):
        raise CheckpointError(
            f"Pickle adapter for {given}: expected {WEIGHTS_NAME}, got adapter_model.bin. Pickles "
            "can run code when loaded and are never opened here: load it by PEFT where you trust "
            "it, and save_pretrained() it."
        )
    name = WEIGHTS_NAME if is_peft else DIFFUSERS_NAME
    path = os.path.join(given, name)
    if not os.path.lexists(path):
        raise CheckpointError(
            f"No adapter for {given}: expected {CONFIG_NAME} with {WEIGHTS_NAME}, or "
            f"{DIFFUSERS_NAME}, got neither. Name the adapter's folder, or its .safetensors file."
        )
    return path


def _read_config(path: str) -> tuple[dict[str, Any], InputFile]:
    with reading(path), open(path, "rb") as file:
        raw = file.read()
        status = os.fstat(file.fileno())
    digest = hashlib.sha256(raw).hexdigest()
    config = load_json_object(raw, "Corrupt adapter configuration", path, strict=False)
    return config, InputFile(path, len(raw), status.st_mtime_ns, digest)


def _adapter(
    path: str,
    is_peft: bool,
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    files: tuple[InputFile, ...],
) -> Adapter:
    style = "peft" if is_peft else style_of(checkpoint.tensors)
    parts: dict[str, dict[Role, tuple[Key, TensorInfo]]] = {}
    whole: dict[str, str] = {}
    for key, info in checkpoint.tensors.items():
        parsed = parse_key(key)
        _refuse(parsed, key, path)
        if parsed.role is Role.ORIGINAL:
            continue
        if parsed.role is Role.WHOLE:
            if parsed.module not in whole or ".modules_to_save." in key:
                whole[parsed.module] = key
        else:
            parts.setdefault(parsed.module, {})[parsed.role] = (parsed, info)
    if not is_peft and any(key.startswith(PEFT_PREFIX) for key in checkpoint.tensors):
        raise CheckpointError(
            f"Adapter without its configuration for {path}: expected {CONFIG_NAME} beside weights "
            "of PEFT, which has their scaling, got none. Name the folder that holds both."
        )
    if not parts:
        raise CheckpointError(
            f"No adapter for {path}: expected keys such as 'M.lora_A.weight', "
            "'lora_unet_M.lora_down.weight' or 'M.ia3_l', got "
            f"{sorted(checkpoint.tensors)[:2]}. Name a LoRA or IA3 adapter."
        )
    own = _Scalings(checkpoint, config, is_peft)
    modules = {name: _module(name, found, own, path) for name, found in parts.items()}
    kinds = {"ia3" if m.up is None else "lora" for m in modules.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"adapter for {path}: expected LoRA or IA3, got both in one file.")
    return Adapter(
        path, style, kinds.pop(), checkpoint, config, modules, whole, (*checkpoint.files, *files)
    )


def _refuse(parsed: Key, key: str, path: str) -> None:
    if parsed.role is Role.DORA:
        raise refused(path, f"DoRA ({key}), which renormalises the sum with the base weight")
    if parsed.role is Role.BIAS:
        raise refused(path, f"a bias of its own ({key})")
    if parsed.role is Role.FOREIGN:
        raise refused(path, f"factors of another decomposition ({key})")


class _Scalings:
    """The s of each module of an adapter, wherever the file or the configuration has it."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any], is_peft: bool) -> None:
        self._checkpoint = checkpoint
        self._config = config if is_peft else None
        text = checkpoint.metadata.get(METADATA_KEY)
        self._parts = header_settings(text, checkpoint.path) if text else {}

    def of(self, module: str, rank: int, alpha: TensorInfo | None) -> float:
        if alpha is not None:
            value = _scalar(self._checkpoint, alpha)
            if not math.isfinite(value):
                raise CheckpointError(
                    f"scaling '{alpha.name}' in {alpha.path}: expected a finite number, got "
                    f"{value}. Download the adapter again."
                )
            return value / rank
        if self._config is not None:
            return scaling_of(self._config, module, rank)
        part, _, inner = module.partition(".")
        if "lora_alpha" in self._parts.get(part, {}):
            return scaling_of(self._parts[part], inner, rank)
        if "lora_alpha" in self._parts.get("", {}):
            return scaling_of(self._parts[""], module, rank)
        return 1.0  # without an α it is r


def _scalar(checkpoint: Checkpoint, info: TensorInfo) -> float:
    """A stored number, without torch."""
    codes = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
    raw = bytes(checkpoint.read(info.name))
    if info.dtype == "BF16" and len(raw) == 2:
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    if info.dtype not in codes or len(raw) != struct.calcsize(codes[info.dtype]):
        raise CheckpointError(
            f"scaling '{info.name}' in {info.path}: expected one number, got shape "
            f"{list(info.shape)} of {info.dtype}. Download the adapter again."
        )
    return float(struct.unpack(codes[info.dtype], raw)[0])


def _module(
    name: str, found: Mapping[Role, tuple[Key, TensorInfo]], scalings: _Scalings, path: str
) -> AdapterModule:
    if Role.VECTOR in found:
        return AdapterModule(name, found[Role.VECTOR][1], None)
    for role, letter in ((Role.DOWN, "A"), (Role.UP, "B")):
        if role not in found:
            raise CheckpointError(
                f"module '{name}' in {path}: expected both factors of its LoRA, got none called "
                f"{letter} ({role.value}). Download the adapter again."
            )
    key, down = found[Role.DOWN]
    up = found[Role.UP][1]
    if 0 in (*down.shape, *up.shape):
        raise CheckpointError(
            f"module '{name}' in {path}: expected factors with values, got empty ones, "
            f"{list(down.shape)} and {list(up.shape)}. DeepSpeed ZeRO-3 leaves such files where "
            "weights were not gathered: save the adapter again with "
            "stage3_gather_16bit_weights_on_model_save."
        )
    rank = down.shape[0] if down.shape else 0
    fits = len(down.shape) == len(up.shape) >= 2 and up.shape[1] == rank > 0
    if not fits or set(up.shape[2:]) - {1}:
        raise CheckpointError(
            f"module '{name}' in {path}: expected A [r, in] and B [out, r], got "
            f"{list(down.shape)} and {list(up.shape)}. Only plain LoRA is merged here."
        )
    alpha = found.get(Role.ALPHA)
    scaling = scalings.of(name, rank, alpha[1] if alpha else None)
    return AdapterModule(name, down, up, scaling, key.embedding)

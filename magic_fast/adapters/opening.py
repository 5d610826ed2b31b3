"""From what a user names to an adapter: its modules, each with its factors and its scaling."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from magic_fast.adapters.forms import LEAVES, Form, forms_of
from magic_fast.adapters.names import PEFT_PREFIX, Key, Role, parse_key, style_of
from magic_fast.adapters.scalings import Scalings
from magic_fast.adapters.settings import (
    check_settings,
    refuse_other_forms,
    refused,
)
from magic_fast.checkpoint import Checkpoint, InputFile, TensorInfo, open_checkpoint
from magic_fast.checkpoint.io_errors import reading
from magic_fast.checkpoint.strict_json import load_json_object
from magic_fast.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_BASE_KEY = "ss_base_model_version"  # in the header


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
        form: how it changes, where that is no plain s·B·A; its own parts are beside it then.
    """

    name: str
    down: TensorInfo
    up: TensorInfo | None
    scaling: float = 1.0
    embedding: bool = False
    weight: str | None = None
    form: Form | None = None

    @property
    def leaf(self) -> str:
        """What of the module changes, mostly its weight."""
        return "weight" if self.form is None else self.form.leaf

    @property
    def rank(self) -> int:
        return self.down.shape[0] if self.form is None else self.form.rank

    @property
    def nbytes(self) -> int:
        if self.form is not None:
            return self.form.nbytes
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
    parts: dict[str, dict[str, tuple[Key, TensorInfo]]] = {}
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
            parts.setdefault(parsed.module, {})[parsed.part or parsed.role.value] = (parsed, info)
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
    plain = [n for n, found in parts.items() if "dora" not in found and "down" in found]
    if config.get("use_dora") and plain:
        raise CheckpointError(
            f"module '{plain[0]}' in {path}: expected its magnitude (lora_magnitude_vector), got "
            "DoRA (use_dora) without one. Download the adapter again."
        )
    own = Scalings(checkpoint, config, is_peft)
    modules = {
        name if m.leaf == "weight" else f"{name}.{m.leaf}": m
        for name, found in parts.items()
        for m in _modules(name, found, own, path)
    }
    kinds = {"ia3" if m.up is None and m.form is None else "lora" for m in modules.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"adapter for {path}: expected LoRA or IA3, got both in one file.")
    return Adapter(
        path, style, kinds.pop(), checkpoint, config, modules, whole, (*checkpoint.files, *files)
    )


def _refuse(parsed: Key, key: str, path: str) -> None:
    if parsed.role is Role.BIAS:
        raise refused(path, f"a bias of its own ({key})")
    if parsed.role is Role.FOREIGN:
        raise refused(path, f"factors of another decomposition ({key})")


def _modules(
    name: str, found: Mapping[str, tuple[Key, TensorInfo]], scalings: Scalings, path: str
) -> list[AdapterModule]:
    """What one module's tensors are: its factors or their form, and differences beside them."""
    plain = {Role.VECTOR.value, Role.DOWN.value, Role.UP.value, Role.ALPHA.value}
    factors = {part: pair for part, pair in found.items() if part not in LEAVES}
    formed = bool(factors.keys() - plain) or factors.keys() <= {Role.ALPHA.value}
    made = [] if formed else [_module(name, factors, scalings, path)]
    infos = {part: info for part, (_, info) in found.items()}
    if made:
        infos = {part: info for part, info in infos.items() if part in LEAVES}
    embedding = any(key.embedding for key, _ in found.values())

    def scaling(rank: int | None) -> float:
        return scalings.of(name, rank, infos.get("alpha"))

    if "diff" in found and len(factors.keys() - {"alpha", "dora"}):
        raise CheckpointError(
            f"module '{name}' in {path}: expected factors or a difference of its weight, got both. "
            "Merge the adapter into its model by the library that made it."
        )
    forms = forms_of(name, infos, scaling, path, scalings.is_peft, embedding)
    made += [
        AdapterModule(name, next(iter(f.parts.values())), None, embedding=f.embedding, form=f)
        for f in forms
    ]
    if not made:
        raise CheckpointError(
            f"module '{name}' in {path}: expected factors or a difference, got only "
            f"{sorted(infos)}. Download the adapter again."
        )
    return made


def _module(
    name: str, found: Mapping[str, tuple[Key, TensorInfo]], scalings: Scalings, path: str
) -> AdapterModule:
    if "vector" in found:
        return AdapterModule(name, found["vector"][1], None)
    for role, letter in ((Role.DOWN, "A"), (Role.UP, "B")):
        if role.value not in found:
            raise CheckpointError(
                f"module '{name}' in {path}: expected both factors of its LoRA, got none called "
                f"{letter} ({role.value}). Download the adapter again."
            )
    key, down = found["down"]
    up = found["up"][1]
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
            f"{list(down.shape)} and {list(up.shape)}. Download the adapter again."
        )
    alpha = found.get("alpha")
    scaling = scalings.of(name, rank, alpha[1] if alpha else None)
    return AdapterModule(name, down, up, scaling, key.embedding)

"""The scaling of a module, wherever a file, its header or a configuration has it."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from magic_fast.adapters.settings import header_settings, scaling_of
from magic_fast.checkpoint import Checkpoint, TensorInfo
from magic_fast.errors import CheckpointError

METADATA_KEY = "lora_adapter_metadata"  # of diffusers, in the header: the configuration as JSON


class Scalings:
    """The s of each module of an adapter, wherever the file or the configuration has it."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any], is_peft: bool) -> None:
        self._checkpoint = checkpoint
        self._config = config if is_peft else None
        text = checkpoint.metadata.get(METADATA_KEY)
        self._parts = header_settings(text, checkpoint.path) if text else {}

    @property
    def is_peft(self) -> bool:
        return self._config is not None

    def of(self, module: str, rank: int | None, alpha: TensorInfo | None) -> float:
        if alpha is not None and rank is not None:
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

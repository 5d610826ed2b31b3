"""``adapter_config.json``: the scaling of a module, and what is refused in words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from magic_fast.errors import CheckpointError

Config = Mapping[str, Any]

# settings under which a product of two factors is not what the adapter adds → what it would be
_OTHER_FORMS = {
    "lora_bias": "a bias of its own (lora_bias)",
    "target_parameters": "factors of bare parameters (target_parameters)",
    "layer_replication": "layers that are used several times (layer_replication)",
    "use_qalora": "QALoRA (use_qalora), which pools its inputs",
    "use_bdlora": "block-diagonal factors (use_bdlora)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "alora_invocation_tokens": "activation by tokens (alora_invocation_tokens)",
    "trainable_token_indices": "trained token rows (trainable_token_indices)",
    "megatron_config": "Megatron's parallel layers (megatron_config)",
}
# initialisations that change the base weight too, so that B·A is not the change of the weight
_CHANGED_BASE = re.compile(r"(pissa|olora|corda|lora_ga|loftq)", re.IGNORECASE)
_NO_CONVERSION = re.compile("loftq", re.IGNORECASE)


def refuse_other_forms(config: Config, path: str) -> None:
    """Raises:
    CheckpointError: the adapter is no sum s·B·A beside an unchanged base.
    """
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind not in ("LORA", "IA3", "LOHA", "LOKR"):
        raise CheckpointError(
            f"adapter type for {path}: expected LORA, LOHA, LOKR or IA3, got {kind}. "
            "Other adapters are not merged here."
        )
    for name, words in _OTHER_FORMS.items():
        if config.get(name):
            raise refused(path, words)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGED_BASE.match(start):
        way = "Merge it into its own base first, by PEFT, and merge the full models."
        if not _NO_CONVERSION.match(start):
            way = (
                "Save the adapter once more by PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=…), which converts it."
            )
        raise CheckpointError(
            f"initialisation for {path}: expected one that leaves the base as it is, got "
            f"{start!r}, which changes it. {way}"
        )


def check_settings(config: Config, path: str) -> None:
    """Refuses settings that are read here and are not what they should be.

    Raises:
        CheckpointError: α that is no number, patterns that are no expressions → numbers, lists of
            modules that are no lists of names.
    """

    def wrong(name: str, expected: str, value: object) -> CheckpointError:
        return CheckpointError(
            f"{name} in {path}: expected {expected}, got {value!r:.60}. Download the adapter again."
        )

    for name in ("lora_alpha", "alpha"):
        if name in config and not _is_finite(config[name]):
            raise wrong(name, "a finite number", config[name])
    for name in ("alpha_pattern", "rank_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, Mapping) or not all(map(_is_finite, pattern.values())):
            raise wrong(name, "names and numbers", pattern)
        for expression in pattern:
            if not _compiles(expression):
                raise wrong(name, "regular expressions", expression)
    for name in ("target_modules", "feedforward_modules", "exclude_modules"):
        value = config.get(name)
        if isinstance(value, str) and not _compiles(value):
            raise wrong(name, "a regular expression", value)
        names = value if isinstance(value, list) else []
        if not isinstance(value, str | list | None) or not all(isinstance(n, str) for n in names):
            raise wrong(name, "names of modules", value)


def header_settings(text: str, path: str) -> dict[str, dict[str, Any]]:
    """Part of a pipeline → its settings, from diffusers' JSON in a file's header; '' is the part of
    settings that name none."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"lora_adapter_metadata in the header of {path}: expected a JSON object, got "
            f"{text!r:.60}. Download the adapter again."
        )
    parts: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        part, _, setting = name.rpartition(".")  # unet.lora_alpha
        parts.setdefault(part, {})[setting] = value
    for settings in parts.values():
        check_settings(settings, path)
    return parts


def _is_finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _compiles(expression: object) -> bool:
    try:
        re.compile(str(expression))
    except re.error:
        return False
    return isinstance(expression, str)


def refused(path: str, words: str) -> CheckpointError:
    """The error for an adapter of a form that is not merged here."""
    return CheckpointError(
        f"adapter form for {path}: expected LoRA, DoRA, LoHa, LoKr, differences or IA3, got "
        f"{words}. Merge it into its base model first, by the library that made it, and merge "
        "the full models."
    )


def scaling_of(config: Config, module: str, rank: int | None) -> float:
    """s of a module: α/r, or α/√r under ``use_rslora``; α from ``alpha_pattern`` where one of its
    patterns matches the end of the module's name, r where it is None so from ``rank_pattern``.

    >>> scaling_of({"lora_alpha": 8, "alpha_pattern": {"fc1": 2}}, "block.fc1", rank=4)
    0.5
    """
    alpha = _by_pattern(config, "alpha", module, config.get("lora_alpha", config.get("alpha", 8)))
    rank = int(_by_pattern(config, "rank", module, config.get("r", 8))) if rank is None else rank
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Config, what: str, module: str, default: Any) -> float:
    for pattern, value in (config.get(f"{what}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)

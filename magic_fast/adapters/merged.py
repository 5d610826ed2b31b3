"""What a merged adapter's files say: ``adapter_config.json`` for PEFT, α for kohya and
diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from magic_fast.adapters.opening import Adapter
from magic_fast.adapters.scalings import METADATA_KEY

_LISTS = ("target_modules", "feedforward_modules")  # names, or one regular expression
# settings beside them that say which modules are adapted
_FILTERS = ("layers_to_transform", "layers_pattern", "exclude_modules")
# how a LoRA is begun or trained, which a merged one is not
_OF_TRAINING: Mapping[str, Any] = {
    "init_lora_weights": True,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}

#: The parts of a pipeline that diffusers has settings of in a header.
_PIPELINE = ("unet", "transformer", "text_encoder", "text_encoder_2")
#: Of kohya's header; the scaling is in the factors, so that α is the rank.
_RANK_KEYS = ("ss_network_dim", "ss_network_alpha")


def merged_config(
    adapters: Sequence[Adapter], ranks: Mapping[str, int], base_model: str | None
) -> dict[str, Any]:
    """``adapter_config.json`` of the result: the first one's, for the modules and ranks there are;
    the scaling is in the factors, so α = r.

    Args:
        ranks: of each module; {} for IA3.
    """
    first = adapters[0].config
    formed = any(m.form is not None for a in adapters for m in a.modules.values())
    if formed and ranks:
        return lora_config(
            ranks, base_model, pattern_of(ranks),
            fan_in_fan_out=any(a.config.get("fan_in_fan_out") for a in adapters),
            task_type=first.get("task_type"),
        )  # fmt: skip
    config = {**first, "base_model_name_or_path": base_model, "inference_mode": True}
    config |= _adapted(adapters)
    if not ranks:
        return config
    config |= {name: value for name, value in _OF_TRAINING.items() if name in first}
    rank = max(ranks.values())
    pattern = rank_pattern(ranks, rank)
    return config | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }


def lora_config(
    ranks: Mapping[str, int],
    base_model: str | None,
    targets: str | Sequence[str],
    *,
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
) -> dict[str, Any]:
    """``adapter_config.json`` of a LoRA with these ranks by module, its scaling in the factors."""
    rank = max(ranks.values())
    pattern = rank_pattern(ranks, rank)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _adapted(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Settings that name just the modules that any of the adapters has."""
    configs = [a.config for a in adapters]
    if all(_same(c, configs[0], (*_LISTS, *_FILTERS)) for c in configs):
        return {}
    same = all(_same(c, configs[0], _FILTERS) for c in configs)
    lists = not any(isinstance(c.get(name), str) for c in configs for name in _LISTS)
    if same and lists and adapters[0].kind == "lora":
        names = {name for c in configs for name in c.get("target_modules") or []}
        return {"target_modules": sorted(names)}
    modules = {name: m for a in adapters for name, m in a.modules.items()}
    found: dict[str, Any] = {"target_modules": pattern_of(modules)}
    found |= {name: None for name in _FILTERS if name in configs[0]}
    if adapters[0].kind == "ia3":
        forward = [name for name in modules if any(is_forward(a, name) for a in adapters)]
        found["feedforward_modules"] = pattern_of(forward) if forward else []
    return found


def merged_header(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, str]:
    """What a header of kohya's or diffusers' says of the result: the entries ``ss_*`` and
    ``modelspec.*`` in which all adapters agree, and its rank."""
    first, *others = (a.checkpoint.metadata for a in adapters)
    header = {
        key: value
        for key, value in first.items()
        if key.startswith(("ss_", "modelspec.")) and all(o.get(key) == value for o in others)
    }
    sizes = set(ranks.values())
    rank = str(sizes.pop()) if len(sizes) == 1 else "Dynamic"
    for key in _RANK_KEYS:
        if any(key in a.checkpoint.metadata for a in adapters):
            header[key] = rank
    if adapters[0].style == "diffusers" and rank == "Dynamic" and not has_alphas(adapters):
        settings = _of_parts(ranks)
        if settings:
            header[METADATA_KEY] = json.dumps(settings, indent=2, sort_keys=True)
    return header


def has_alphas(adapters: Sequence[Adapter]) -> bool:
    """Whether files say the scaling of a module beside its factors."""
    return any(f"{name}.alpha" in a.checkpoint.tensors for a in adapters for name in a.modules)


def _of_parts(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Diffusers' settings of each part of a pipeline. Where ranks differ and nothing says α,
    diffusers before 0.43 takes the first module's rank for it."""
    parts: dict[str, dict[str, int]] = {}
    for name, rank in ranks.items():
        part, _, module = name.partition(".")
        if part in _PIPELINE:
            parts.setdefault(part, {})[module] = rank
    found: dict[str, Any] = {}
    for part, own in parts.items():
        rank = max(own.values())
        pattern = rank_pattern(own, rank)
        settings = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(own),
        }
        found |= {f"{part}.{name}": value for name, value in settings.items()}
    return found


def is_forward(adapter: Adapter, module: str) -> bool:
    """Whether an IA3 adapter has the module and scales its inputs, by PEFT's rule: names in
    ``feedforward_modules`` are ends of a module's, a string is an expression for all of it."""
    forward = adapter.config.get("feedforward_modules") or []
    if module not in adapter.modules:
        return False
    if isinstance(forward, str):
        return re.fullmatch(forward, module) is not None
    return any(module.endswith(name) for name in forward)


def _same(one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]) -> bool:
    def value(config: Mapping[str, Any], name: str) -> Any:
        found = config.get(name)
        if isinstance(found, list) and name != "layers_pattern":
            return sorted(found, key=str)
        return found

    return all(value(one, name) == value(other, name) for name in names)


def pattern_of(modules: Sequence[str] | Mapping[str, Any]) -> str:
    """A regular expression for these modules and no others, as PEFT matches whole names against a
    ``target_modules`` that is one string.

    >>> pattern_of(["a.fc1", "fc1"])
    '(a\\\\.fc1|fc1)'
    """
    return "(" + "|".join(re.escape(name) for name in modules) + ")"


def rank_pattern(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """The modules whose rank is another than ``rank``. PEFT takes the first entry that a module's
    name ends with: longer names stand first, and names that end with one of another rank stand
    there too.

    >>> rank_pattern({"fc": 4, "block.fc": 8, "out": 8}, 8)
    {'block.fc': 8, 'fc': 4}
    """
    other = {name for name, own in ranks.items() if own != rank}
    alike = {name for name in ranks if any(name.endswith(f".{o}") for o in other)}
    return {name: ranks[name] for name in sorted(other | alike, key=lambda n: (-len(n), n))}

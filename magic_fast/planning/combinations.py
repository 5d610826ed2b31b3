"""Which values a sweep goes through, and the configuration of each combination."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from magic_fast.config import MergeConfig
from magic_fast.config.problems import show_path
from magic_fast.config.references import listed_groups, owners
from magic_fast.config.settings import check_setting
from magic_fast.errors import ConfigError
from magic_fast.methods.registry import find_method, suggest
from magic_fast.methods.spec import ParameterSpec

MOST = 256  # combinations
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Combination:
    """One of the cross product: its folder's name, and value by parameter."""

    name: str
    values: Mapping[str, Any]


def combinations(settings: Mapping[str, Sequence[Any]]) -> list[Combination]:
    """The cross product of all values, the last parameter running fastest.

    Raises:
        ConfigError: nothing to go through, the same value twice, or too many combinations.

    >>> [c.name for c in combinations({"density": [0.1, 0.2], "scale": [1.0]})]
    ['density=0.1,scale=1.0', 'density=0.2,scale=1.0']
    """
    if not settings:
        raise ConfigError("sweep: expected at least one parameter with its values, got none.")
    for name, values in settings.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(f"values of '{name}': expected a list of them, got {values!r}.")
        if not values:
            raise ConfigError(f"values of '{name}': expected at least one, got none.")
        for n, value in enumerate(values):
            if value in values[:n]:
                raise ConfigError(
                    f"values of '{name}': expected each once, got {value!r} twice. Remove one."
                )
    count = math.prod(len(values) for values in settings.values())
    if count > MOST:
        raise ConfigError(
            f"combinations: expected at most {MOST}, got {count}. Sweep fewer values at a time."
        )
    found: list[Combination] = []
    names: set[str] = set()
    for n, values in enumerate(itertools.product(*settings.values())):
        chosen = dict(zip(settings, values, strict=True))
        name = ",".join(f"{_safe(key)}={_safe(_word(value))}" for key, value in chosen.items())
        if len(name) > _LONGEST_NAME or name in names or name.endswith(".safetensors"):
            name = f"{name[:_LONGEST_NAME]}-{n}"
        names.add(name)
        found.append(Combination(name, chosen))
    return found


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _safe(text: str) -> str:
    """``text`` as a part of a folder's name on any file system."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_") or "_"


def check_settings(config: MergeConfig, settings: Mapping[str, Sequence[Any]]) -> None:
    """Refuses parameters that the method has not, and values out of range.

    Raises:
        ConfigError: one that names the parameter.
    """
    seen: dict[object, str] = {}
    for name, values in settings.items():
        key: object = name
        if _block_of(name) == "parameters":
            spec = _spec(config, name)
            key = spec.name
            _check_values(spec, name, values)
            _refuse_finer(config, spec, name)
        if key in seen:
            raise ConfigError(
                f"parameter '{name}': expected each parameter once, got it as '{seen[key]}' too. "
                "Remove one."
            )
        seen[key] = name


def _block_of(name: str) -> str:
    """Where in the configuration a swept name stands."""
    head, _, rest = name.partition(".")
    if name == "seed":
        return "seed"
    if head == "calibrate" and rest:
        return "calibrate"
    return "parameters"


def _spec(config: MergeConfig, name: str) -> ParameterSpec:
    method = find_method(config.merge_method)
    spec = method.find(name.removeprefix("parameters."))
    if spec is None:
        known = [n for p in method.parameters for n in p.names]
        raise ConfigError(
            f"unknown parameter '{name}' for {method.name}: expected one of "
            f"{', '.join(known) or 'none'}, seed, or calibrate.NAME.{suggest(name, known)}"
        )
    return spec


def _check_values(spec: ParameterSpec, name: str, values: Sequence[Any]) -> None:
    for value in values:
        if value is None:
            raise ConfigError(f"value of '{name}': expected {spec.expected()}, got nothing.")
        for problem in check_setting(spec, value, (name,)):
            raise ConfigError(f"{problem.wrong} for '{name}': {problem.detail}")


def _refuse_finer(config: MergeConfig, spec: ParameterSpec, name: str) -> None:
    """What stands at a model or a slice goes before what is shared, so a sweep would do nothing."""
    data = config.as_dict()
    places: list[tuple[str, Any]] = []
    for path, group in listed_groups(data):
        places += [(show_path(place), owner) for place, owner in owners(data, path)]
        places += [(entry.model or "a model", entry.raw) for entry in group]
    for where, owner in places:
        block = owner.get("parameters")
        if isinstance(block, Mapping) and any(block.get(n) is not None for n in spec.names):
            raise ConfigError(
                f"parameter '{name}' at {where}: expected it under the top-level 'parameters:' "
                "only, got a value there, which a sweep would not change. Remove it."
            )


def configure(config: MergeConfig, combination: Combination) -> MergeConfig:
    """The configuration with the values of one combination in their places.

    Raises:
        ConfigError: a value that does not fit with the others.
    """
    data = config.as_dict()
    parameters = dict(data.get("parameters") or {})
    for name, value in combination.values.items():
        block = _block_of(name)
        if block == "seed":
            data["seed"] = value
        elif block == "calibrate":
            written = data.get("calibrate")
            if written is None:
                raise ConfigError(
                    f"parameter '{name}': expected a configuration that calibrates, got one "
                    "without. Add 'calibrate: wsc'."
                )
            own = dict(written) if isinstance(written, Mapping) else {}
            data["calibrate"] = own | {name.partition(".")[2]: value}
        else:
            spec = _spec(config, name)
            for known in spec.names:
                parameters.pop(known, None)
            parameters[spec.name] = value
    if parameters:
        data["parameters"] = parameters
    return MergeConfig.from_dict(data, source=combination.name, folder=config.folder)

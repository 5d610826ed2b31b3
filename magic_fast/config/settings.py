"""A parameter's setting (scalar, gradient, filter list): checked once, evaluated per tensor.

A *setting* is what stands after a parameter's name in the YAML:

* a scalar: that value everywhere;
* a list of numbers: a gradient, piecewise linear over the layers, at ``t`` in [0, 1];
* a list of ``{filter, value}``: the value (again a setting) of the first entry whose ``filter`` is
  a substring of the tensor's name; an entry without a filter, or with ``"*"``, matches all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from magic_fast.config.problems import Path, Problem
from magic_fast.methods.registry import suggest
from magic_fast.methods.spec import ParameterSpec, Value, is_number

_ENTRY_KEYS = ("filter", "value")


def check_setting(spec: ParameterSpec, setting: object, path: Path) -> Iterator[Problem]:
    """Every fault of one setting. ``None`` means "not set" and is fine."""
    if setting is None:
        return
    if isinstance(setting, Mapping):
        yield from _check_entry(spec, setting, path)
    elif isinstance(setting, list | tuple):
        yield from _check_list(spec, setting, path)
    elif not spec.accepts(setting):
        yield _bad_value(spec, setting, path)


def _check_list(spec: ParameterSpec, setting: Sequence[object], path: Path) -> Iterator[Problem]:
    if not setting:
        yield Problem(path, "empty list", f"expected {spec.expected()}, got []. Give a value.")
        return
    entries = [isinstance(item, Mapping) for item in setting]
    if any(entries):
        for index, item in enumerate(setting):
            if isinstance(item, Mapping):
                yield from _check_entry(spec, item, (*path, index))
            else:
                yield Problem(
                    (*path, index),
                    "mixed list",
                    f"expected {{filter, value}} entries only, got {item!r}. "
                    f"Write '- value: {item}' for the default.",
                )
    elif not spec.numeric:
        yield Problem(
            path,
            "gradient of something that is not a number",
            f"expected {spec.expected()}, got {setting!r}. Give one value, or {{filter, value}} "
            "entries.",
        )
    else:
        for index, item in enumerate(setting):
            if not spec.accepts(item):
                yield _bad_value(spec, item, (*path, index))


def _check_entry(spec: ParameterSpec, entry: Mapping[Any, Any], path: Path) -> Iterator[Problem]:
    for key in entry:
        if key not in _ENTRY_KEYS:
            yield Problem(
                (*path, key),
                "unknown key",
                f"expected filter and value, got {key!r}.{suggest(key, _ENTRY_KEYS)} Correct it.",
            )
    if not isinstance(entry.get("filter"), str | None):
        yield Problem(
            (*path, "filter"),
            "bad filter",
            f"expected a part of a tensor name, got {entry['filter']!r}. Put it in quotes.",
        )
    if entry.get("value") is None:
        yield Problem(
            path,
            "entry without a value",
            f"expected {spec.expected()} under 'value', got nothing. Add 'value:'.",
        )
    else:
        yield from check_setting(spec, entry["value"], (*path, "value"))


def _bad_value(spec: ParameterSpec, value: object, path: Path) -> Problem:
    advice = "Correct it."
    if spec.name == "density" and is_number(value) and 1 < value <= 100:
        advice = f"Write {value / 100:g} if {value:g} % is meant."
    wrong = "value out of range" if is_number(value) else "value of the wrong type"
    return Problem(path, wrong, f"expected {spec.expected()}, got {value!r}. {advice}")


def evaluate(setting: Any, name: str, t: float) -> Value | None:
    """The value of a (checked) setting for tensor ``name`` at gradient position ``t``.

    Args:
        setting: scalar, gradient, filter list or None.
        name: name of the output tensor.
        t: 0 at the first layer of a slice, 1 at its last.

    Returns:
        The value, or None where no filter matches.

    >>> evaluate([0, 0.5, 0.3, 0.7, 1], "model.layers.1.mlp.up_proj.weight", 0.5)
    0.3
    >>> evaluate([{"filter": "mlp", "value": 1}, {"value": 0.5}], "model.norm.weight", 0.0)
    0.5
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return cast("Value | None", setting)
    if not isinstance(setting[0], Mapping):
        return _interpolate(setting, t)
    for entry in setting:
        wanted = entry.get("filter")
        if wanted is None or wanted == "*" or wanted in name:
            return evaluate(entry["value"], name, t)
    return None


def _interpolate(points: Sequence[float], t: float) -> float:
    """Piecewise linear through equally spaced ``points``, at ``t`` in [0, 1]."""
    position = t * (len(points) - 1)
    left = min(int(position), len(points) - 1)
    right = min(left + 1, len(points) - 1)
    fraction = position - left
    return (1 - fraction) * points[left] + fraction * points[right]


def filters_of(setting: object) -> Iterator[str]:
    """All filter words of a setting, nested ones too."""
    if isinstance(setting, Mapping):
        if isinstance(setting.get("filter"), str):
            yield setting["filter"]
        yield from filters_of(setting.get("value"))
    elif isinstance(setting, list | tuple):
        for item in setting:
            yield from filters_of(item)

"""Python arguments of a method: names checked, defaults filled in, K numbers where K are due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from magic_fast.errors import InputError
from magic_fast.methods.presets import check_preset
from magic_fast.methods.registry import find_method, suggest
from magic_fast.methods.spec import ParameterSpec
from magic_fast.recipe import per_expert


def python_name(spec: ParameterSpec) -> str:
    """The keyword that Python calls use for a parameter of the YAML."""
    return spec.argument or spec.name


def _value(spec: ParameterSpec, value: Any, num_experts: int, method: str, preset: str) -> Any:
    per_model = spec.scope == "per_model"
    many = per_model and not isinstance(value, str | bool | int | float)
    items: Sequence[Any] = list(value) if many else [value]
    for i, item in enumerate(items):
        if hasattr(item, "item"):
            item = items[i] = item.item()  # type: ignore[index]
        if not spec.accepts(item):
            where = f" of expert {i}" if many else ""
            raise InputError(
                f"{python_name(spec)}{where} for method {method!r}: expected "
                f"{spec.expected()}, got {item!r}."
            )
    if per_model and spec.kind == "float":
        return per_expert(items if many else float(value), num_experts, python_name(spec))
    return spec.normalized(items[0] if many else value, preset)


def resolve_arguments(
    method: str, given: Mapping[str, Any], num_experts: int, preset: str
) -> dict[str, Any]:
    """Every parameter of ``method`` by its Python name, defaults of ``preset`` filled in.

    Args:
        given: what the caller passed; None counts as absent.

    Raises:
        InputError: unknown method, parameter or preset; a value out of range; a missing required
            one.
    """
    spec = find_method(method)
    check_preset(preset, method)
    names: dict[str, ParameterSpec] = {}
    for p in spec.parameters:
        for name in (python_name(p), *p.names):
            names[name] = p
    resolved: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        found = names.get(name)
        if found is None:
            known = sorted({python_name(p) for p in spec.parameters})
            raise InputError(
                f"parameter {name!r} for method {method!r}: expected one of "
                f"{', '.join(known) or 'none'}, got an unknown one.{suggest(name, known)}"
            )
        resolved[python_name(found)] = _value(found, value, num_experts, method, preset)
    for p in spec.parameters:
        key = python_name(p)
        if key in resolved:
            continue
        default = p.default_for(preset)
        if default is None and p.required:
            raise InputError(
                f"parameter {key!r} for method {method!r}: expected {p.expected()}, got none."
            )
        if default is not None:
            resolved[key] = _value(p, default, num_experts, method, preset)
    return resolved

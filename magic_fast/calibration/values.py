"""The settings of calibrations: what each accepts, and its check. Each setting and its default are
written once, in the class that has it; the YAML, the command line and the catalog derive theirs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields
from enum import Enum
from typing import Any

from magic_fast.calibration.sensitivity.lists import names_of
from magic_fast.errors import InputError

_SENSITIVE = "names of tensors or modules that may only shrink, or their file"
#: Kind of setting → its values in words; those of an enum are its words.
_ACCEPTS = {
    "norm": "a whole number >= 1, or inf",
    "bounds": "[low, high] of a coefficient, or none",
    "exponent": "an exponent >= 0; 0 does nothing",
    "factor": "a factor after the coefficient",
    "share": "a share in [0, 1)",
    "flag": "true or false",
    "names": _SENSITIVE,
    "tensor names": _SENSITIVE,
    "tensors": "general, magic, or include and exclude patterns",
    "axes": "axis or axes of output units, or patterns of names with theirs",
}


def setting(default: Any, kind: type | str, option: str = "") -> Any:
    """A field of a class of settings.

    Args:
        kind: an enum, or one of ``_ACCEPTS``, or ``variant``.
        option: help of its option on the command line, where it has one; ``{default}`` stands for
            its default.
    """
    return field(default=default, metadata={"kind": kind, "option": option})


def settings_of(kind: type) -> list[Field[Any]]:
    """The settings of a class, in its order."""
    return [f for f in fields(kind) if "kind" in f.metadata]


def setting_of(kind: type, name: str) -> Field[Any]:
    """The setting of that name."""
    return next(f for f in settings_of(kind) if f.name == name)


def default_of(kind: type, name: str) -> Any:
    """A default as plain value: an enum's word."""
    value = setting_of(kind, name).default
    return value.value if isinstance(value, Enum) else value


def words_of(kind: type, name: str) -> tuple[str, ...]:
    """The words that a setting takes, its default first."""
    f = setting_of(kind, name)
    words = [str(member) for member in f.metadata["kind"]]
    return tuple(sorted(words, key=lambda w: w != str(f.default)))


def accepts(kind: type, name: str) -> str:
    """The values of a setting in words."""
    f = setting_of(kind, name)
    if f.metadata["kind"] in _ACCEPTS:
        return _ACCEPTS[f.metadata["kind"]]
    *first, last = words_of(kind, name)
    return f"{', '.join(first)} or {last}"


def check_settings(settings: Any) -> None:
    """Checks every field of a frozen object, and gives words their enum.

    Raises:
        InputError: one is not what it accepts.
    """
    for f in settings_of(type(settings)):
        value = getattr(settings, f.name)
        object.__setattr__(settings, f.name, _checked(f.name, f.metadata["kind"], value))


def _checked(name: str, kind: Any, value: Any) -> Any:
    if isinstance(kind, type):
        return word(kind, value, name)
    if kind == "norm":
        return norm_of(value)
    if kind == "bounds":
        return bounds_of(value)
    if kind == "axes" and isinstance(value, Mapping):
        return {axes_pattern(pattern): axes_of(axes, pattern) for pattern, axes in value.items()}
    if kind in ("names", "tensor names"):
        return names_of(value, kind)
    if kind in ("exponent", "factor", "share") and not (is_number(value) and math.isfinite(value)):
        raise InputError(f"calibration {name}: expected a finite number, got {value!r}.")
    if kind == "share" and not 0 <= value < 1:
        raise InputError(f"calibration {name}: expected a share in [0, 1), got {value!r}.")
    return value


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def norm_of(value: object) -> float:
    """The p of a norm: an integer >= 1 or infinity."""
    p = math.inf if value in ("inf", math.inf) else value
    if not is_number(p) or (p != math.inf and (p != p // 1 or p < 1)):  # type: ignore[operator]
        raise InputError(f"calibration p: expected an integer >= 1 or 'inf', got {value!r}.")
    return p


def bounds_of(value: object) -> tuple[float, float] | None:
    """The (low, high) of a clamp, or None."""
    if value is None:
        return None
    low = high = math.nan  # no bound holds of them
    if isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value)):
        low, high = float(value[0]), float(value[1])
    if not 0 <= low <= high:
        raise InputError(
            f"calibration clamp: expected (low, high) with 0 <= low <= high, got {value!r}."
        )
    return low, high


def axes_pattern(pattern: object) -> str:
    """A regular expression on names that has axes of its own."""
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        raise InputError(
            f"pattern {pattern!r} of calibration row_axis: expected a regular expression, got an "
            f"error: {error}. Escape special characters with a backslash."
        ) from None
    return str(pattern)


def axes_of(value: object, pattern: object) -> int | tuple[int, ...]:
    """The axis or axes of a pattern."""
    axes = tuple(value) if isinstance(value, list | tuple) else (value,)
    found = tuple(axis for axis in axes if type(axis) is int)
    if not axes or found != axes:
        raise InputError(
            f"calibration row_axis for pattern {pattern!r}: expected an axis or a list of them, "
            f"got {value!r}."
        )
    return found if isinstance(value, list | tuple) else found[0]


def word(kind: type, value: object, what: str) -> object:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(repr(str(v)) for v in kind)  # type: ignore[attr-defined]
        raise InputError(f"calibration {what}: expected one of {allowed}, got {value!r}.") from None


def known_settings(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping, refused where it has a name that ``kind`` lacks."""
    known = [f.name for f in fields(kind) if f.init]
    for name in value:
        if name not in known:
            raise InputError(
                f"calibration {name!r}: expected one of {', '.join(known)}, got an unknown one."
            )
    return dict(value)

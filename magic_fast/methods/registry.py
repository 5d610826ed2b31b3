"""Every method by its name: those of the package, those that users register, and those that
installed packages bring. A method is one :class:`MethodSpec`; nothing else names it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib import import_module

from magic_fast.errors import InputError
from magic_fast.methods.parameters import NO_EFFECT
from magic_fast.methods.spec import MethodSpec
from magic_fast.plugins import entry_points_of

GROUP = "magic_fast.methods"

#: The modules with methods, in the order in which documents list them; each has ``METHODS``.
_MODULES = (
    "elementwise.sums",
    "elementwise.ties",
    "elementwise.dare",
    "elementwise.della",
    "elementwise.breadcrumbs",
    "elementwise.largest",
    "elementwise.consensus",
    "elementwise.sce",
    "elementwise.ram",
    "elementwise.pcb",
    "elementwise.nearswap",
    "elementwise.arcee_fusion",
    "geometric",
    "spectral",
)
_registered: dict[str, MethodSpec] = {}


def _methods_of(module: str) -> tuple[MethodSpec, ...]:
    methods: tuple[MethodSpec, ...] = import_module(f"magic_fast.methods.{module}").METHODS
    return methods


@cache
def built_in() -> Mapping[str, MethodSpec]:
    """The methods of the package by their names."""
    return {spec.name: spec for module in _MODULES for spec in _methods_of(module)}


@cache
def _steps() -> Mapping[str, MethodSpec]:
    return {spec.name: spec for spec in _methods_of("steps")}


def methods() -> dict[str, MethodSpec]:
    """Every method by its name; those of installed packages are loaded first."""
    entry_points_of(GROUP)  # a package's module registers its methods when it is imported
    return {**built_in(), **_registered}


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sorted(methods()))


def get(name: str) -> MethodSpec | None:
    """The method of that name, or None. Installed packages are only asked for unknown names."""
    known = built_in().get(name) or _registered.get(name)
    return known or methods().get(name)


def suggest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'ties'?``, or '' where nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def find_method(name: str, *, beside: Collection[str] = ()) -> MethodSpec:
    """The method of that name.

    Args:
        beside: names that the caller would have taken too.

    Raises:
        InputError: there is none; the message lists the names and suggests a close one.
    """
    spec = get(name)
    if spec is not None:
        return spec
    known = [*names(), *beside]
    raise InputError(
        f"method {name!r}: expected one of {', '.join(known)}, got an unknown name."
        f"{suggest(name, known)}"
    )


def find_step(name: str) -> MethodSpec:
    """A method, or a step that only plans name (:mod:`magic_fast.methods.steps`)."""
    return _steps().get(name) or find_method(name)


def known_parameters() -> frozenset[str]:
    """Names and aliases of the parameters of all methods."""
    found = {name for row in methods().values() for spec in row.parameters for name in spec.names}
    return frozenset(found | NO_EFFECT.keys())


def registered() -> Mapping[str, MethodSpec]:
    """The methods that were registered so far."""
    return _registered


def register(spec: MethodSpec) -> None:
    """Adds a method, or replaces one of that name that was registered before."""
    _registered[spec.name] = spec

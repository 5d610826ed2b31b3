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

#: Module → the methods in its ``METHODS``, in the order in which documents list them. A module is
#: imported when one of them is looked up.
_MODULES = {
    "elementwise.sums": ("linear", "average", "task_arithmetic", "passthrough"),
    "elementwise.trims": (
        *("ties", "magnitude_prune", "dare_linear", "dare_ties"),
        *("della", "della_linear", "breadcrumbs", "breadcrumbs_ties"),
    ),
    "elementwise.largest": ("magmax", "emr_unified"),
    "elementwise.consensus": ("consensus_ta",),
    "elementwise.weighing": ("sce", "ram", "ramplus_tl", "pcb"),
    "elementwise.nearswap": ("nearswap",),
    "elementwise.arcee_fusion": ("arcee_fusion",),
    "geometric": ("slerp", "nuslerp", "multislerp", "karcher", "model_stock"),
    "spectral": ("iso_c", "iso_cts", "tsv_m", "star"),
}
_HOMES = {name: module for module, inside in _MODULES.items() for name in inside}
_loaded: dict[str, MethodSpec] = {}
_registered: dict[str, MethodSpec] = {}


def _methods_of(module: str) -> dict[str, MethodSpec]:
    specs: tuple[MethodSpec, ...] = import_module(f"magic_fast.methods.{module}").METHODS
    return {spec.name: spec for spec in specs}


def _built_in(name: str) -> MethodSpec | None:
    if name not in _loaded and name in _HOMES:
        for other, spec in _methods_of(_HOMES[name]).items():
            _loaded.setdefault(other, spec)
    return _loaded.get(name)


def built_in() -> dict[str, MethodSpec]:
    """The methods of the package by their names."""
    return {name: spec for name in _HOMES if (spec := _built_in(name)) is not None}


@cache
def _steps() -> Mapping[str, MethodSpec]:
    return _methods_of("steps")


def methods() -> dict[str, MethodSpec]:
    """Every method by its name; those of installed packages are loaded first."""
    entry_points_of(GROUP)  # a package's module registers its methods when it is imported
    return {**built_in(), **_registered}


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sorted(methods()))


def get(name: str) -> MethodSpec | None:
    """The method of that name, or None. Installed packages are only asked for unknown names."""
    known = _loaded.get(name) or _built_in(name) or _registered.get(name)
    return known or methods().get(name)


def suggest(name: object, known: Iterable[str]) -> str:
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
    spec = _loaded.get(name) or get(name)
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


def is_built_in(name: str) -> bool:
    """Whether the package has a method of that name."""
    return name in _HOMES


def register(spec: MethodSpec) -> None:
    """Adds a method, or replaces one of that name that was registered before."""
    _registered[spec.name] = spec

"""What others add: entry points of installed packages, modules that ``MAGIC_FAST_PLUGINS`` names,
each loaded once, and the checks that registrations share."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

from magic_fast.errors import InputError

log = logging.getLogger("magic_fast")


@cache
def entry_points_of(group: str) -> tuple[dict[str, object], dict[str, str]]:
    """What installed packages offer under ``group``, for example ``magic_fast.backends``; modules
    of ``MAGIC_FAST_PLUGINS`` are imported before.

    The first call imports what the entry points name, so call it on first use of a registry, not
    on import. Both dictionaries are shared by all callers; leave them as they are.

    Returns:
        (Name → the loaded object, name → the reason it is left out), each in alphabetical order.

    Raises:
        InputError: ``MAGIC_FAST_PLUGINS`` names a module that cannot be imported.
    """
    from importlib.metadata import entry_points

    _import_named_modules()
    offered = sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value))
    values: dict[str, set[str]] = {}
    for entry in offered:
        values.setdefault(entry.name, set()).add(entry.value)
    loaded: dict[str, object] = {}
    left_out: dict[str, str] = {}
    for entry in offered:
        if entry.name in loaded or entry.name in left_out:
            continue
        reason = None
        if len(values[entry.name]) > 1:
            reason = f"several packages offer it: {', '.join(sorted(values[entry.name]))}"
        else:
            try:
                loaded[entry.name] = entry.load()
            except Exception as error:  # of any kind: it is code of others
                reason = f"{entry.value} cannot be loaded: {type(error).__name__}: {error}"
        if reason is not None:
            left_out[entry.name] = reason
            log.warning("entry point %s of %s is left out: %s", entry.name, group, reason)
    return loaded, left_out


def _import_named_modules() -> None:
    """Imports what ``MAGIC_FAST_PLUGINS`` names, separated by commas (as pytest has
    ``PYTEST_PLUGINS``). The user asks for these by name, so a broken one is an error."""
    for name in os.environ.get("MAGIC_FAST_PLUGINS", "").replace(",", " ").split():
        try:
            importlib.import_module(name)
        except Exception as error:  # of any kind: it is code of others
            raise InputError(
                f"MAGIC_FAST_PLUGINS: expected modules that can be imported, got {name!r}: "
                f"{type(error).__name__}: {error}. Correct it, or put its folder on PYTHONPATH."
            ) from error


def check_registration(
    kind: str,
    name: str,
    factory: str | Callable[[], Any],
    devices: Sequence[str],
    taken: Collection[str],
) -> None:
    """The arguments that every registration has.

    Args:
        kind: with its article: ``a backend``.
        name: the new one.
        factory: a callable of no arguments, or ``"module:attribute"``.
        devices: words such as ``cpu``.
        taken: names that are registered.

    Raises:
        InputError: one of them is not as described, or the name is taken.
    """
    what = f"{kind.partition(' ')[2]} {name!r}"
    if not isinstance(name, str) or not name or name == "auto":
        raise InputError(f"name of {kind}: expected a word other than 'auto', got {name!r}.")
    if name in taken:
        raise InputError(f"name of {kind}: expected one that is not taken, got {name!r}.")
    if not callable(factory) and not (isinstance(factory, str) and factory.count(":") == 1):
        raise InputError(
            f"factory of {what}: expected a callable or 'module:attribute', got {factory!r}."
        )
    if not devices or not all(isinstance(d, str) and len(d) > 1 for d in devices):
        raise InputError(f"devices of {what}: expected names such as ('cpu',), got {devices!r}.")


def made(factory: str | Callable[[], Any]) -> Any:
    """What a factory of a registration makes; ``"module:attribute"`` is imported."""
    if not isinstance(factory, str):
        return factory()
    module, _, attribute = factory.partition(":")
    return getattr(importlib.import_module(module), attribute)()

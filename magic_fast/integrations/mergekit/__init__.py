"""mergekit with methods that run here: :func:`install`, and everything that goes through
mergekit's registry (its commands, ``merge_tensors``, ``merge_state_dicts``) runs them.

Known releases: 0.1.4 and 0.1.5. docs/drop-in.md says what is replaced and how results may differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from magic_fast.errors import InputError, missing_package
from magic_fast.integrations import Revertible

if TYPE_CHECKING:
    from magic_fast.integrations.mergekit.calls import Replaced

__all__ = ["Installation", "install", "uninstall"]

log = logging.getLogger("magic_fast")

#: Release → the module that knows its protocol.
_PROTOCOLS = {"0.1.4": "tasks", "0.1.5": "registry"}

_active: Replaced | None = None


class Installation(Revertible):
    """What :func:`install` did; leaving its ``with`` takes it back, unless it was there before.

    Attributes:
        replaced, added, left: names of methods that run here now, that are new in mergekit's YAML,
            and that are still mergekit's own.
    """

    def __init__(self, done: Replaced, *, own: bool) -> None:
        self.replaced, self.added, self.left = done.replaced, done.added, done.left
        self._undo = uninstall if own else None


def installed_version() -> str:
    """The version of mergekit here.

    Raises:
        InputError: it is not installed.
    """
    try:
        return version("mergekit")
    except PackageNotFoundError:
        raise missing_package("mergekit", f"for {__name__}", "mergekit") from None


def install() -> Installation:
    """Replaces merge methods of mergekit by ours (docs/drop-in.md), and adds ours that it lacks.

    One line of the log (``magic_fast``, INFO) says which. Done twice, it stays done once.

    Returns:
        an :class:`Installation`, also a context manager.

    Raises:
        InputError: mergekit is not installed, or in a release that is not known here; then
            nothing was replaced.
    """
    global _active
    found = installed_version()
    if _active is not None:
        return Installation(_active, own=False)
    if found not in _PROTOCOLS:
        raise InputError(
            f"version of mergekit: expected one of {', '.join(sorted(_PROTOCOLS))}, got {found}. "
            "Nothing was replaced: another release may call its methods in another way. Install "
            "one of these, or run the YAML by `magic-fast merge`."
        )
    module = import_module(f"magic_fast.integrations.mergekit.{_PROTOCOLS[found]}")
    from magic_fast.integrations.mergekit.calls import REPLACED

    replace_methods: Callable[[tuple[str, ...]], Replaced] = module.replace_methods
    _active = replace_methods(REPLACED)
    log.info(_active.in_words(found))
    return Installation(_active, own=True)


def uninstall() -> None:
    """mergekit's own methods again. Without an installation it does nothing."""
    global _active
    if _active is not None:
        _active.undo()
        _active = None

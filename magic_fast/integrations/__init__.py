"""Other libraries, each imported only when something of it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

#: What stands in front of other packages; importing one of these imports nothing of theirs.
_FRONTS = ("fusion_bench", "mergekit", "peft")
_Self = TypeVar("_Self", bound="Revertible")


def __getattr__(name: str) -> object:
    if name not in _FRONTS:
        raise AttributeError(f"module 'magic_fast.integrations' has no attribute {name!r}")
    return import_module(f"magic_fast.integrations.{name}")


class Revertible:
    """What an ``install()`` hands out, whatever library it was for. Leaving its ``with`` calls
    ``undo``, unless what was installed was there before (None)."""

    _undo: Callable[[], None] | None = None

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._undo is not None:
            self._undo()

"""What an ``install()`` hands out, whatever library it was for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Self = TypeVar("_Self", bound="Revertible")


class Revertible:
    """Leaving its ``with`` calls ``undo``, unless what was installed was there before (None)."""

    _undo: Callable[[], None] | None = None

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._undo is not None:
            self._undo()

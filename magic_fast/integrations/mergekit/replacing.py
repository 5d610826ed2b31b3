"""What a replacement did, and how it is taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """Names of mergekit's methods.

    Attributes:
        replaced: run here now.
        added: are new in its YAML.
        left: are still its own.
        undo: puts back what was there.
    """

    replaced: tuple[str, ...]
    added: tuple[str, ...]
    left: tuple[str, ...]
    undo: Callable[[], None]

    def in_words(self, version: str) -> str:
        """The one line that is logged."""
        return (
            f"mergekit {version}: replaced {', '.join(self.replaced) or 'nothing'}; "
            f"added {', '.join(self.added) or 'nothing'}; "
            f"left as they are: {', '.join(self.left) or 'none'}"
        )

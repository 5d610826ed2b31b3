"""What a replacement did, and how it is taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from magic_fast.integrations.mergekit import calls
from magic_fast.methods.spec import MethodSpec


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


def replace_in(
    table: dict[str, Any],
    names: Sequence[str],
    replacement: Callable[[Any], Any | None],
    new: Callable[[MethodSpec], Any],
) -> Replaced:
    """Puts the replacements of ``names`` into a registry (method by name), and beside them the
    methods that it lacks. ``replacement`` gives None for a method that it does not know."""
    before = dict(table)
    fast = {n: replacement(table[n]) for n in names if n in table}
    found = {name: method for name, method in fast.items() if method is not None}
    added = {spec.name: new(spec) for spec in calls.new_methods(tuple(table))}
    table.update(found | added)

    def undo() -> None:
        for name, method in (found | added).items():
            if table.get(name) is method:  # someone else's replacement stays
                if name in before:
                    table[name] = before[name]
                else:
                    del table[name]

    left = [name for name in before if name not in found]
    return Replaced(tuple(found), tuple(added), tuple(left), undo)

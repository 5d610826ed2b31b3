"""What is wrong with a configuration: where, in words, all of it at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from magic_fast.errors import ConfigError

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One fault: ``path`` inside the document, what is ``wrong``, and what was expected and got."""

    path: Path
    wrong: str
    detail: str


@dataclass(frozen=True)
class Origin:
    """Where a document came from: its name and the line on which each key or item starts."""

    source: str | None = None
    lines: Mapping[Path, int] = field(default_factory=dict)

    def line_of(self, path: Path) -> int | None:
        """The line of ``path``, or of the nearest enclosing key that has one."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def where(self, path: Path) -> str:
        """``models[1].parameters.density (merge.yml, line 9)``."""
        line = self.line_of(path)
        place = [self.source] if self.source else []
        if line is not None:
            place.append(f"line {line}")
        shown = show_path(path)
        return f"{shown} ({', '.join(place)})" if place else shown


def show_path(path: Path) -> str:
    """A path as a reader of the YAML would write it: ``slices[0].sources[1].layer_range``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text or "the document"


def listed(words: Iterable[str]) -> str:
    """Names joined for a message."""
    return ", ".join(words) or "nothing"


def raise_problems(problems: Sequence[Problem], origin: Origin) -> None:
    """Raise one :class:`ConfigError` that holds every problem, in the order of the document."""
    if not problems:
        return
    unique = list(dict.fromkeys(problems))
    unique.sort(key=lambda problem: origin.line_of(problem.path) or 0)
    texts = [f"{p.wrong} for {origin.where(p.path)}: {p.detail}" for p in unique]
    if len(texts) == 1:
        raise ConfigError(texts[0])
    name = origin.source or "the configuration"
    raise ConfigError("\n  - ".join([f"{len(texts)} problems in {name}:", *texts]))

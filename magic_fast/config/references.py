"""Model references, and where a raw configuration lists models."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from magic_fast.config.problems import Path


def parse_reference(value: Any) -> str:
    """A model reference as one normalised string.

    Accepts a path, ``{path: p}`` and mergekit's ``{model: {path: p}}`` with null extras.

    Raises:
        ValueError: anything else, in words.

    >>> parse_reference({"model": {"path": "./models/base/"}})
    'models/base'
    """
    while isinstance(value, Mapping):
        extras = {key: v for key, v in value.items() if key not in ("model", "path") and v}
        if extras:
            key = next(iter(extras))
            raise ValueError(
                f"expected only a path, got '{key}', which is not supported. Apply it to the "
                "model first and name the folder that results"
            )
        if ("model" in value) == ("path" in value):
            raise ValueError(f"expected one of the keys model and path, got {dict(value)!r}")
        value = value["model"] if "model" in value else value["path"]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected the path of a checkpoint, got {value!r}")
    return posixpath.normpath(value.strip())


def reference_or_none(value: Any) -> str | None:
    """:func:`parse_reference`, None where it would raise."""
    try:
        return parse_reference(value)
    except ValueError:
        return None


@dataclass(frozen=True)
class Entry:
    """One listed model: where it stands, what it is called."""

    path: Path
    model: str | None
    raw: Mapping[str, Any]


#: Lists of models that are merged with one another, each with its place.
Groups = list[tuple[Path, list[Entry]]]


def listed_groups(data: Mapping[str, Any]) -> Groups:
    """The lists of models that are merged with one another: one, or one for each slice."""
    groups: Groups = []
    if isinstance(data.get("models"), list | tuple):
        groups.append((("models",), _entries(("models",), data["models"])))
    if isinstance(data.get("slices"), list | tuple):
        for index, part in enumerate(data["slices"]):
            if isinstance(part, Mapping) and isinstance(part.get("sources"), list | tuple):
                path: Path = ("slices", index, "sources")
                groups.append((path, _entries(path, part["sources"])))
    return groups


def _entries(path: Path, items: Any) -> list[Entry]:
    return [
        Entry((*path, index), reference_or_none(item.get("model")), item)
        for index, item in enumerate(items)
        if isinstance(item, Mapping)
    ]


def references(data: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Every model reference of a raw configuration, with its place."""
    base = reference_or_none(data.get("base_model"))
    if base is not None:
        yield ("base_model",), base
    for _, group in listed_groups(data):
        for entry in group:
            if entry.model is not None:
                yield (*entry.path, "model"), entry.model

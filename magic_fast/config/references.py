"""Model references, where they lie, and where a raw configuration lists models."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from magic_fast.config.problems import Path, listed
from magic_fast.errors import ConfigError


def parse_reference(value: Any) -> str:
    """A model reference as one normalised string.

    Accepts a path, ``{path: p}`` and mergekit's ``{model: {path: p}}``, with ``lora: {path: q}``
    for an adapter (``p+q``) and otherwise null extras.

    Raises:
        ValueError: anything else, in words.

    >>> parse_reference({"model": {"path": "./models/base/"}})
    'models/base'
    """
    if isinstance(value, Mapping) and value.get("lora"):
        adapter = parse_reference(value["lora"])
        rest = {key: v for key, v in value.items() if key != "lora"}
        return f"{parse_reference(rest)}+{adapter}"
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


def find_path(reference: str, folder: FilePath | None) -> FilePath | None:
    """``reference`` against the current directory, then against ``folder``; None if in neither."""
    path = FilePath(reference).expanduser()
    for candidate in (path, folder / path if folder is not None else path):
        if candidate.exists():
            return candidate
    return None


def find_model(reference: str, folder: FilePath | None) -> tuple[FilePath, FilePath | None] | None:
    """The model and the adapter of a reference ``model+adapter``, by :func:`find_path`; the adapter
    is None where the reference is a model's own name. None where one of them is nowhere."""
    whole = find_path(reference, folder)
    if whole is not None:
        return whole, None
    parts = reference.split("+")
    for n in range(1, len(parts)):
        found = [find_path("+".join(p), folder) for p in (parts[:n], parts[n:])]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None


def require_model(reference: str, folder: FilePath | None) -> tuple[FilePath, FilePath | None]:
    """:func:`find_model`.

    Raises:
        ConfigError: a part of it is in neither place.
    """
    location = find_model(reference, folder)
    if location is None:
        places = listed(str(p) for p in (FilePath.cwd(), folder) if p is not None)
        both = "both parts of model+adapter"
        what = both if "+" in reference else "a folder or .safetensors file"
        raise ConfigError(
            f"missing checkpoint for {reference}: expected {what} in {places}, got nothing "
            "there. Correct the path, or download the model first."
        )
    return location


def require_file(name: str, folder: FilePath | None, *, key: str, what: str) -> FilePath:
    """:func:`find_path` of a file that a key of the configuration names.

    Raises:
        ConfigError: it is in neither place.
    """
    path = find_path(name, folder)
    if path is None:
        raise ConfigError(
            f"missing file for {key}: expected {what}, got {name!r}, which does not exist. "
            "Correct the path."
        )
    return path


@dataclass(frozen=True)
class Entry:
    """One listed model: where it stands, what it is called."""

    path: Path
    model: str | None
    raw: Mapping[str, Any]


#: Lists of models that are merged with one another, each with its place.
Groups = list[tuple[Path, list[Entry]]]


def parts(data: Mapping[str, Any]) -> list[tuple[Path, Mapping[str, Any]]]:
    """What may list models or slices, with its place: the top level, and each of ``modules:``."""
    found: list[tuple[Path, Mapping[str, Any]]] = [((), data)]
    if isinstance(data.get("modules"), Mapping):
        for name, module in data["modules"].items():
            if isinstance(module, Mapping):
                found.append((("modules", name), module))
    return found


def listed_groups(data: Mapping[str, Any]) -> Groups:
    """The lists of models that are merged with one another: one, or one for each slice, of the top
    level or of each module."""
    groups: Groups = []
    for place, part in parts(data):
        if isinstance(part.get("models"), list | tuple):
            path: Path = (*place, "models")
            groups.append((path, _entries(path, part["models"])))
        if isinstance(part.get("slices"), list | tuple):
            for index, piece in enumerate(part["slices"]):
                if isinstance(piece, Mapping) and isinstance(piece.get("sources"), list | tuple):
                    path = (*place, "slices", index, "sources")
                    groups.append((path, _entries(path, piece["sources"])))
    return groups


def slice_of(path: Path) -> Path | None:
    """The slice that a list of models belongs to; None for whole models."""
    return path[:-1] if path[-1] == "sources" else None


def owners(data: Mapping[str, Any], path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """What stands between the top level and a list of models, outermost first: its module, its
    slice. Each may have ``parameters:`` of its own."""
    places = [path[:2]] if path[0] == "modules" else []
    piece = slice_of(path)
    found = []
    for place in (*places, *([piece] if piece is not None else [])):
        owner: Any = data
        for key in place:
            owner = owner[key]
        found.append((place, owner))
    return found


def base_of(data: Mapping[str, Any], path: Path) -> str | None:
    """What the task vectors of a list start from: its slice's ``base_model``, or all's."""
    piece = slice_of(path)
    own = owners(data, path)[-1][1].get("base_model") if piece is not None else None
    return reference_or_none(own) or reference_or_none(data.get("base_model"))


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
    for path, group in listed_groups(data):
        piece = slice_of(path)
        own = reference_or_none(owners(data, path)[-1][1].get("base_model")) if piece else None
        if piece is not None and own is not None:
            yield (*piece, "base_model"), own
        for entry in group:
            if entry.model is not None:
                yield (*entry.path, "model"), entry.model

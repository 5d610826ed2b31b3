"""Families of diffusion models: the parts that they are made of, and what names of files and
adapters mean in each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from magic_fast.models.diffusion.names import Link, Naming, map_of


class Part(NamedTuple):
    """A part of a model as a file has it.

    Attributes:
        prefix: before its names.
        naming: whose names they are.
        places: diffusers' name → how the file has it, and the name there.
    """

    prefix: str
    naming: Naming
    places: dict[str, tuple[Link, str]]


class Meaning(NamedTuple):
    """What a name of an adapter may mean in a family.

    Attributes:
        part: of the model: ``unet``, ``text encoder``.
        prefix: before its names in the adapter.
        naming: whose name it is.
        flat: dots are written as underscores.
        links: the parameter, or the parameters whose rows one original tensor holds.
    """

    part: str
    prefix: str
    naming: Naming
    flat: bool
    links: tuple[Link, ...]


@cache
def families() -> dict[str, dict[str, dict[str, Any]]]:
    """Name → its parts: their maps, what files have ``also`` that is no parameter, and the prefixes
    of their names in files of models, in adapters with dots (``dotted``), and in kohya's
    (``flat``)."""
    text = Path(__file__).with_name("families.json").read_text()
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return found


def family_parts(family: str, names: Iterable[str]) -> dict[str, Part]:
    """The parts of a family that a file holds. One of which the map does not know every name that
    there is has no places."""
    every = {p for f in families().values() for part in f.values() for p in part["files"] if p}
    groups: dict[str, list[str]] = {}
    for name in names:
        prefix = max((p for p in every if name.startswith(p)), key=len, default="")
        groups.setdefault(prefix, []).append(name)
    found: dict[str, Part] = {}
    for part, entry in families()[family].items():
        tried = [
            Part(prefix, naming, _places(entry, prefix, naming, groups[prefix]))
            for prefix in entry["files"]
            if prefix in groups
            for naming in Naming
        ]
        best = next((one for one in tried if one.places), None)
        if best or any(one.prefix for one in tried):
            found[part] = best or tried[0]
    return found


def _places(
    entry: Mapping[str, Any], prefix: str, naming: Naming, names: Iterable[str]
) -> dict[str, tuple[Link, str]]:
    places: dict[str, tuple[Link, str]] = {}
    for name in names:
        inner = name[len(prefix) :]
        links = list(map_of(entry["map"]).links(inner, naming))
        if not links and inner not in entry.get("also", ()):
            return {}
        places |= {link.names[0]: (link, name) for link in links}
    return places


def meanings(family: str, name: str, *, flat: bool = False) -> list[Meaning]:
    """What a parameter's name in an adapter, or with ``flat`` kohya's name of a module, may mean.

    >>> [m.part for m in meanings("Flux", "transformer.x_embedder.weight")]
    ['transformer']
    >>> meanings("Stable Diffusion XL", "lora_te2_text_model_encoder_layers_0_mlp_fc1", flat=True)[
    ...     0].links[0].names[1]
    'transformer.resblocks.0.mlp.c_fc.weight'
    """
    found: list[Meaning] = []
    for part, entry in families()[family].items():
        for prefix in entry["flat" if flat else "dotted"]:
            if name.startswith(prefix):
                for naming in Naming:
                    inner = name[len(prefix) :]
                    links = tuple(map_of(entry["map"]).links(inner, naming, flat))
                    if links and not any(m.part == part and m.links == links for m in found):
                        found.append(Meaning(part, prefix, naming, flat, links))
    return found


def recognised(names: Iterable[str]) -> dict[str, dict[str, Part]]:
    """The families of which a file is, each with its parts: those whose maps know most of its
    names; none where no map knows a part."""
    found = {family: family_parts(family, names) for family in families()}
    known = {
        f: len({n for p in parts.values() for _, n in p.places.values()})
        for f, parts in found.items()
    }
    most = max(known.values())
    return {f: parts for f, parts in found.items() if known[f] == most > 0}

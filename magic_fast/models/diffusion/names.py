"""The maps between the names that diffusers has for parameters and the original ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import IntEnum
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

Rows = tuple[int, tuple[tuple[int, int], ...]]


class Naming(IntEnum):
    """Whose names a file has."""

    DIFFUSERS = 0
    ORIGINAL = 1


class Link(NamedTuple):
    """A parameter of diffusers' model, and the original tensor that holds it.

    Attributes:
        names: diffusers' one and the original one.
        rows: which rows of the original, in order: a number of equal parts, and ranges of them;
            None for all as they are.
        turned: it is the transpose of the original.
    """

    names: tuple[str, str]
    rows: Rows | None
    turned: bool


class _Record:
    """One entry of a map: a pattern of each side, ``*`` for numbers."""

    def __init__(self, patterns: tuple[str, str], table: dict[str, str], rows: Any) -> None:
        self.patterns = patterns
        turned = {theirs: ours for ours, theirs in table.items()}
        self._tables = (table, turned)
        self._rows = (rows[0], tuple(map(tuple, rows[1:]))) if isinstance(rows, list) else None
        self._turned = rows == "T"

    @cached_property
    def _expressions(self) -> tuple[re.Pattern[str], ...]:
        every = (*self.patterns, *(_flat(stem_of(p)) for p in self.patterns))
        return tuple(re.compile(re.escape(p).replace(r"\*", r"(\d+)")) for p in every)

    def link(self, name: str, side: int, flat: bool) -> Link | None:
        """What the record says of a name of that side."""
        found = self._expressions[side + 2 * flat].fullmatch(name)
        if found is None:
            return None
        numbers = list(found.groups())
        table = self._tables[side]
        if table:
            length = len(next(iter(table)).split())
            head = table.get(" ".join(numbers[:length]))
            if head is None:
                return None
            others = [*head.split(), *numbers[length:]]
        else:
            others = numbers
        both = (numbers, others) if side == 0 else (others, numbers)
        names = tuple(_filled(p, n) for p, n in zip(self.patterns, both, strict=True))
        return Link((names[0], names[1]), self._rows, self._turned)


class NameMap:
    """One map of ``names.json``."""

    def __init__(self, plain: dict[str, Any]) -> None:
        self._places: dict[tuple[str, int, bool], list[_Record]] = {}
        for pattern, other, table, rows in map(_complete, plain["names"]):
            tables = plain["tables"][table] if table >= 0 else {}
            for leaf in ("weight", "bias") if pattern.endswith("@") else ("",):
                patterns = (pattern.replace("@", leaf), other.replace("@", leaf))
                self._add(_Record(patterns, tables, rows))

    def _add(self, record: _Record) -> None:
        for side, pattern in enumerate(record.patterns):
            self._places.setdefault((_starred(pattern), side, False), []).append(record)
            if stem_of(pattern) != pattern:
                key = _starred(_flat(stem_of(pattern)))
                self._places.setdefault((key, side, True), []).append(record)

    def links(self, name: str, side: Naming, flat: bool = False) -> Iterator[Link]:
        """What a name is on that side: one link of diffusers' names, all parts of an original one.

        Args:
            flat: ``name`` is a module's, dots written as underscores, and its weight is meant.
        """
        for record in self._places.get((_starred(name), side, flat), ()):
            link = record.link(name, side, flat)
            if link is not None:
                yield link


@cache
def map_of(name: str) -> NameMap:
    """A map by its name."""
    return NameMap(_plain()["maps"][name])


@cache
def _plain() -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(Path(__file__).with_name("names.json").read_text())
    return plain


def stem_of(parameter: str) -> str:
    """The module of a weight; another parameter as it is."""
    return parameter.removesuffix(".weight")


def _complete(entry: list[Any]) -> tuple[str, str, int, Any]:
    """With what an entry leaves out: the same name, no table, all rows."""
    pattern, other, table, rows = entry + [entry[0], -1, ""][len(entry) - 1 :]
    return pattern, other, table, rows


def _starred(name: str) -> str:
    return re.sub(r"(?<![^._])\d+(?![^._])", "*", name)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _filled(pattern: str, numbers: list[str]) -> str:
    """With numbers in place of the stars, in order."""
    parts = pattern.split("*")
    return "".join(f"{part}{n}" for part, n in zip(parts, [*numbers, ""], strict=True))

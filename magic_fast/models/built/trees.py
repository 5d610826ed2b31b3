"""Module trees with the numbers of layers left out.

A node is a mapping: a child's name → its node, ``*`` for every number of a list of modules; ``""``
→ the kinds of module that stand there, each its class and the records of its parameters; ``@`` → a
part of the model that has a type of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Node = dict[str, Any]
#: Local name of a parameter → what it is: kind, unit axes, vocabulary axis, dimensions.
Records = dict[str, tuple[Any, ...]]
#: Whether stacks of experts are transposed, gate and up are halves, there is a gate, a bias.
Experts = tuple[bool, bool, bool, bool]
#: A class, the layout of its experts where it holds stacks of them, the records of its parameters.
ModuleKind = tuple[str, "Experts | None", Records]


def merge(a: Node, b: Node) -> Node:
    """A node that has whatever one of two has."""
    result = dict(a)
    for key, value in b.items():
        if key not in result:
            result[key] = value
        elif key == "":
            result[key] = _merge_kinds(result[key], value)
        elif key != "@":  # one part of the configuration, whatever type it names by default
            result[key] = merge(result[key], value)
    return result


def _merge_kinds(a: list[ModuleKind], b: list[ModuleKind]) -> list[ModuleKind]:
    result = list(a)
    for owner, experts, records in b:
        for i, (other, layout, known) in enumerate(result):
            alike = owner == other and experts == layout
            joined = _joined(known, records) if alike else None
            if joined is not None:
                result[i] = (owner, experts, joined)
                break
        else:
            result.append((owner, experts, records))
    return result


def _joined(a: Records, b: Records) -> Records | None:
    """The records of both, or None where they differ in more than that one knows no words: some
    configurations cannot be built with sizes that tell words apart."""
    result = dict(a)
    for name, record in b.items():
        other = result.setdefault(name, record)
        if other != record:
            (_, units, words, dimensions), (_, *rest) = record, other
            if [units, dimensions] != [rest[0], rest[2]] or (words is None) == (rest[1] is None):
                return None
            result[name] = other if words is None else record
    return result


def ambiguous(node: Node) -> bool:
    """Whether parameters of one name and as many dimensions have different output units."""
    seen: dict[tuple[str, int], Any] = {}
    for _, _, records in node.get("", ()):
        for name, (_, units, _, dimensions) in records.items():
            if seen.setdefault((name, dimensions), units) != units:
                return True
    return any(ambiguous(inner) for key, inner in node.items() if key not in ("", "@"))


def subtract(a: Node, b: Node) -> Node:
    """What ``a`` has and ``b`` has not."""
    result: Node = {}
    for key, value in a.items():
        if key == "":
            left = [kind for kind in value if not _among(kind, b.get("", []))]
            if left:
                result[key] = left
        elif key == "@":
            if b.get(key) != value:
                result[key] = value
        else:
            rest = subtract(value, b.get(key, {}))
            if rest:
                result[key] = rest
    return result


def _among(kind: ModuleKind, kinds: list[ModuleKind]) -> bool:
    owner, experts, records = kind
    return any(
        (owner, experts) == (other, layout) and _joined(known, records) == known
        for other, layout, known in kinds
    )


def packed(node: Node, kinds: list[Any]) -> Any:
    """The node as the table has it: kinds are places in ``kinds``, a node of one kind that has no
    children is that number alone."""
    result: Node = {}
    for key in sorted(node):
        if key == "":
            result[key] = sorted(_place(kind, kinds) for kind in node[key])
            if len(result[key]) == 1:
                result[key] = result[key][0]
        elif key == "@":
            result[key] = list(node[key])
        else:
            result[key] = packed(node[key], kinds)
    return result[""] if list(result) == [""] else result


def _place(kind: ModuleKind, kinds: list[Any]) -> int:
    owner, experts, records = kind
    entry: list[Any] = [owner, {name: _short(r) for name, r in sorted(records.items())}]
    if experts is not None:
        entry.append([int(flag) for flag in experts])
    if entry not in kinds:
        kinds.append(entry)
    return kinds.index(entry)


def _short(record: tuple[Any, ...]) -> list[Any]:
    return [list(value) if isinstance(value, tuple) else value for value in record]


def paths(node: Mapping[str, Any], path: str = "") -> list[tuple[str, Node]]:
    """Every node under ``node`` with its dotted path."""
    result = []
    for key, value in node.items():
        if key not in ("", "@"):
            inner = f"{path}.{key}" if path else key
            result += [(inner, value), *paths(value, inner)]
    return result

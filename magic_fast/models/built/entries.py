"""The entry of one model type, made of the classes of the installed transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from magic_fast.models.built import classes
from magic_fast.models.built.conversions import conversions_of
from magic_fast.models.built.trees import Node, merge, packed, subtract
from magic_fast.models.built.visits import Visit, Walker


@dataclass
class Description:
    """What the classes of one model type show.

    Attributes:
        model_type: as configurations spell it.
        primary: the class that names the type's tensors.
        prefixes: where the base model stands in the classes, "" for the top.
        prefix: where it stands in ``primary``.
        base: its tree.
        heads: class → tree of what stands outside the base.
        ties: class → canonical name → canonical name whose values it has.
        tied: whether the default configuration ties.
        stacks: canonical path → part of the configuration, field of the count, fields of lists.
        conversions: renamings and conversions of the primary class.
        others: class → its conversions where they differ.
        ignored: patterns of names that are left aside when a checkpoint is loaded.
        parts: type, class and tree of parts that have types of their own.
        types: the types of all parts that have one of their own.
        failures: class → the reason why it cannot be built.
    """

    model_type: str
    primary: str = ""
    prefixes: set[str] = field(default_factory=lambda: {""})
    prefix: str = ""
    base: Node = field(default_factory=dict)
    heads: dict[str, Node] = field(default_factory=dict)
    ties: dict[str, dict[str, str]] = field(default_factory=dict)
    tied: bool = False
    stacks: dict[str, tuple[str, str | None, tuple[str, ...]]] = field(default_factory=dict)
    conversions: list[Any] = field(default_factory=list)
    others: dict[str, list[Any]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    parts: list[tuple[str, str, Node]] = field(default_factory=list)
    types: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)

    def add_part(self, name: str, tree: Node) -> None:
        """What a model of class ``name`` shows that is a part of another type's."""
        if name == classes.base_name(self.model_type):
            self.base = merge(self.base, tree)
            return
        for prefix in self.prefixes:
            tree = subtract(tree, _under(self.base, prefix))
        if tree:
            self.heads[name] = merge(self.heads.get(name, {}), tree)

    def entry(self) -> dict[str, Any]:
        """As the table has it; what is empty is left out."""
        kinds: list[Any] = []
        entry = {
            "class": self.primary,
            "prefix": self.prefix,
            "prefixes": sorted(self.prefixes, key=lambda p: (-len(p), p)),
            "base": packed(self.base, kinds),
            "heads": {name: packed(tree, kinds) for name, tree in sorted(self.heads.items())},
            "kinds": kinds,
            "ties": {name: _collapsed(ties) for name, ties in sorted(self.ties.items()) if ties},
            "tied": self.tied,
            "stacks": {path: list(fields) for path, fields in sorted(self.stacks.items())},
            "conversions": self.conversions,
            "others": dict(sorted(self.others.items())),
            "ignored": sorted(self.ignored),
        }
        return {key: value for key, value in entry.items() if value or key == "base"}


def describe(
    model_type: str,
    kind_of_part: Callable[[str, str], str | None],
    make: Callable[[], Any],
    variants: Sequence[Callable[[], Any]] = (),
) -> Description:
    """What the classes of ``model_type`` show. Classes that cannot be built are in ``failures``;
    without any that can, ``primary`` is empty.

    Args:
        model_type: as configurations spell it.
        kind_of_part: (model type, class) → ``base`` or ``head`` where a part of that class has an
            entry of its own, else None.
        make: makes the configuration.
        variants: make others, whose base models may have modules that the first one leaves out.
    """
    result = Description(model_type)
    base_name = classes.base_name(model_type)
    built: list[tuple[str, str | None, Any, Visit]] = []
    for name in classes.names(model_type):
        try:
            model, words = classes.build(name, make)
        except Exception as error:
            result.failures[name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            continue
        if next(model.parameters(), None) is None:  # what other classes of the type derive from
            continue
        where = "" if name == base_name else _base_inside(model, base_name)
        labels = frozenset({classes.LABELS, classes.LABELS + 1})
        walker = Walker(model, words, labels, kind_of_part, where)
        built.append((name, where, model, walker.visit))
        result.parts += walker.visit.parts
        result.types |= walker.visit.types
    if not built:
        return result
    for name, _, _, visit in built:
        if name == base_name:
            result.base = visit.tree
    for _, where, model, visit in built:
        if where and _is_base(_at(model, where), base_name):
            result.base = merge(result.base, _tree_at(visit.tree, where))
    for variant in variants:
        model, words = classes.build(base_name or "", variant)
        tree = Walker(model, words, frozenset(), kind_of_part, "").visit.tree
        result.base = merge(result.base, tree)
    built = [(name, _checked(where, visit, result.base), m, visit)
             for name, where, m, visit in built]  # fmt: skip
    result.primary = built[0][0]
    result.prefix = built[0][1] or ""
    result.tied = bool(getattr(make(), "tie_word_embeddings", False))
    for name, where, model, visit in built:
        _add(result, name, where, model, visit)
    return result


def _add(result: Description, name: str, where: str | None, model: Any, visit: Visit) -> None:
    prefix = where or ""
    result.prefixes.add(prefix)
    outside = subtract(visit.tree, _under(result.base, prefix))
    if outside:
        result.heads[name] = outside

    def canonical(path: str) -> str:
        if prefix:
            inner = path.removeprefix(f"{prefix}.") if path.startswith(f"{prefix}.") else None
        else:
            inner = path if _holds(result.base, path) else None
        return path if inner is None else ".".join(filter(None, (result.prefix, inner)))

    ties = getattr(model, "all_tied_weights_keys", None) or {}
    result.ties[name] = {canonical(a): canonical(b) for a, b in sorted(ties.items())}
    for path, fields in visit.stacks.items():
        result.stacks.setdefault(canonical(path), fields)
    conversions = conversions_of(model)
    if name == result.primary:
        result.conversions = conversions
    elif conversions != result.conversions and conversions:
        result.others[name] = conversions
    result.ignored |= set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def _base_inside(model: Any, base_name: str | None) -> str | None:
    """Where the base model, or a part of it such as its encoder, stands in one with a head."""
    from transformers import PreTrainedModel

    for name, child in model.named_children():
        if _is_base(child, base_name):
            return str(name)
    prefix: str = model.base_model_prefix
    inner = _at(model, prefix) if prefix else None
    if isinstance(inner, PreTrainedModel) and type(inner.config) is type(model.config):
        return prefix
    return None


def _checked(where: str | None, visit: Visit, base: Node) -> str | None:
    """``where``, unless what stands there is no part of the base model."""
    return where if where and not subtract(_tree_at(visit.tree, where), base) else None


def _is_base(model: Any, base_name: str | None) -> bool:
    return type(model).__name__ == base_name


def _at(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = getattr(model, part, None)
    return model


def _tree_at(tree: Node, path: str) -> Node:
    for part in path.split("."):
        tree = tree.get(part, {})
    return tree


def _under(tree: Node, path: str) -> Node:
    for part in reversed(path.split(".") if path else []):
        tree = {part: tree}
    return tree


def _holds(tree: Node, path: str) -> bool:
    """Whether a path leads somewhere in a tree; a part with a type of its own holds anything."""
    node = tree
    for part in path.split("."):
        if "@" in node:
            return True
        if part in node:
            node = node[part]
        elif part.isdigit() and "*" in node:
            node = node["*"]
        else:
            return any(part in records for _, _, records in node.get("", []))
    return True


_DIGITS = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _collapsed(ties: dict[str, str]) -> dict[str, str]:
    """Ties that differ by numbers alone become one: each ``*`` of the name goes to the place of
    its number in the source (``\\1``, ``\\2`` …)."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, source in ties.items():
        groups.setdefault(_DIGITS.sub("*", name), []).append((name, source))
    result: dict[str, str] = {}
    for pattern, pairs in sorted(groups.items()):
        template = _template(pairs)
        if len(pairs) > 1 and template is not None:
            result[pattern] = template
        else:
            result.update(pairs)
    return result


def _template(pairs: list[tuple[str, str]]) -> str | None:
    """The source of every pair as one template of the name's numbers, or None."""
    numbers = [_DIGITS.findall(name) for name, _ in pairs]
    sources = [_DIGITS.split(source) for _, source in pairs]
    values = [_DIGITS.findall(source) for _, source in pairs]
    if any(texts != sources[0] for texts in sources):
        return None
    result = sources[0][0]
    for place, text in enumerate(sources[0][1:]):
        column = [value[place] for value in values]
        if len(set(column)) == 1:
            result += column[0]
        else:
            same = [
                k for k in range(len(numbers[0])) if column == [number[k] for number in numbers]
            ]
            if not same:
                return None
            result += f"\\{same[0] + 1}"
        result += text
    return result

"""Finds parameters in the module trees of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from magic_fast.models.model_roles import StackFields
from magic_fast.models.roles import MAPS, Kind
from magic_fast.models.table import Entry, entry_of

#: Where configurations of multimodal models keep that of their text model, and how configurations
#: call the number of layers.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Found(NamedTuple):
    """A parameter of a module tree.

    Attributes:
        kind: what it does.
        units: axes that count output units in the module's layout, or None.
        vocabulary: axis whose places are words, or None.
        dimensions: how many axes it has.
        owner: class of the module.
        experts: transposed, concatenated, gate, bias: the layout of a stack of experts, or None.
        block: how many parts of the path lead to the number of its block, or None.
        uniform: whether that number says nothing but which block it is.
    """

    kind: Kind
    units: tuple[int, ...] | None
    vocabulary: int | None
    dimensions: int
    owner: str
    experts: tuple[bool, ...] | None
    block: int | None
    uniform: bool


#: How many parts of a path lead to the number of a block; whether the tree knows that number only
#: as any number.
Place = tuple[int, bool]


class Tree:
    """The module tree of one model type under one configuration."""

    def __init__(self, entry: Entry, config: Mapping[str, Any]) -> None:
        self.entry = entry
        self.config = config

    @property
    def prefix(self) -> str:
        """Where the base model stands, "" for the top."""
        prefix: str = self.entry.get("prefix", "")
        return prefix

    def place(self, name: str, architecture: str) -> tuple[str, list[Found]]:
        """The canonical name of ``name``, which may have the prefix of any class or none, and the
        parameters that it may be; none where the tree has no such name."""
        heads = self.entry.get("heads", {})
        for prefix in self.entry["prefixes"]:
            if prefix and not name.startswith(f"{prefix}."):
                continue
            own = [] if prefix else list(self._in_head(heads.get(architecture, {}), name))
            if own:
                return name, own
            inner = name[len(prefix) + 1 :] if prefix else name
            found = list(self._in_base(inner))
            if found:
                return f"{self.prefix}.{inner}" if self.prefix else inner, found
        chosen = [heads[architecture]] if architecture in heads else list(heads.values())
        for prefix in ("", *filter(None, self.entry["prefixes"])):  # some have one too many
            if not prefix or name.startswith(f"{prefix}."):
                inner = name[len(prefix) + 1 :] if prefix else name
                found = [one for head in chosen for one in self._in_head(head, inner)]
                if found:
                    return inner, found
        return name, []

    def _in_base(self, name: str) -> Iterator[Found]:
        depth = self.prefix.count(".") + 1 if self.prefix else 0
        yield from self._find(self.entry["base"], name.split("."), depth, None)

    def _in_head(self, tree: Any, name: str) -> Iterator[Found]:
        yield from self._find(tree, name.split("."), 0, None)

    def _find(
        self, node: Any, parts: Sequence[str], depth: int, block: Place | None
    ) -> Iterator[Found]:
        if not isinstance(node, dict):
            node = {"": node}
        reference = node.get("@")
        if reference is not None:
            yield from self._in_part(reference, parts, depth, block)
        name, *rest = parts
        if not rest:
            yield from self._own(node.get("", ()), name, block)
            return
        if name.isdigit() and "*" in node:
            inner = node["*"]
            if block is None and isinstance(inner, dict) and any(key for key in inner):
                block = depth, name not in node
            yield from self._find(node.get(name, inner), rest, depth + 1, block)
        elif name in node and name:
            yield from self._find(node[name], rest, depth + 1, block)

    def _in_part(
        self, reference: Sequence[Any], parts: Sequence[str], depth: int, block: Place | None
    ) -> Iterator[Found]:
        """In a part with a type of its own: the configuration's, or else the default one."""
        tree = self._part(reference)
        if tree is None:
            return
        entry, kind = tree.entry, reference[2]
        if kind == "base":
            yield from tree._find(entry["base"], parts, depth, block)
            return
        name = ".".join(parts)
        for prefix in entry["prefixes"]:
            below = prefix.count(".") + 1 if prefix else 0
            if not prefix or name.startswith(f"{prefix}."):
                found = list(tree._find(entry["base"], parts[below:], depth + below, block))
                if found:
                    yield from found
                    return
        heads = entry.get("heads", {})
        for head in (heads.get(entry["class"], {}), *heads.values()):
            found = list(tree._find(head, parts, depth, block))
            if found:
                yield from found
                return

    def _part(self, reference: Sequence[Any]) -> Tree | None:
        """The tree of a part: of the type that the configuration states, or the default one."""
        path, default, _ = reference
        config = part_of(self.config, path)
        entry = entry_of(str(config.get("model_type", default)))
        return None if entry is None else Tree(entry, config)

    def parts(self) -> Iterator[tuple[str, Sequence[Any], Tree]]:
        """The parts that have types of their own: canonical path, reference, tree."""
        yield from self._parts(self.entry["base"], self.prefix)
        yield from self._parts(self.entry.get("heads", {}).get(self.entry["class"], {}), "")

    def _parts(self, node: Any, path: str) -> Iterator[tuple[str, Sequence[Any], Tree]]:
        for key, inner in node.items() if isinstance(node, dict) else ():
            if key == "@":
                tree = self._part(inner)
                if tree is not None:
                    yield path, inner, tree
            elif key:
                yield from self._parts(inner, f"{path}.{key}" if path else key)

    def stacks(self) -> dict[str, StackFields]:
        """Canonical path of each stack of layers → its fields, those of parts too."""
        result = {
            path: StackFields(part, count, tuple(lists))
            for path, (part, count, lists) in self.entry.get("stacks", {}).items()
        }
        for path, (place, _, kind), tree in self.parts():
            for inner, fields in tree.stacks().items():
                if kind == "base" and tree.prefix:
                    if not inner.startswith(f"{tree.prefix}."):
                        continue
                    inner = inner[len(tree.prefix) + 1 :]
                part = ".".join(filter(None, (place, fields.part)))
                result[f"{path}.{inner}" if path else inner] = replace(fields, part=part)
        return result

    def conversions(self, architecture: str) -> list[Mapping[str, Any]]:
        """The renamings and conversions of a class, and those of parts whose type is not the
        default one."""
        own = self.entry.get("others", {}).get(architecture, self.entry.get("conversions", []))
        result = list(own)
        for path, (_, default, _), tree in self.parts():
            if tree.entry is entry_of(default):
                continue
            inside = path.removeprefix(f"{self.prefix}.") if self.prefix else path
            for plain in tree.conversions(tree.entry["class"]):
                inner = plain.get("scope", ["", ""])[0]
                scope = [f"{inside}.{inner}" if inner else inside, self.prefix]
                result.append({**plain, "scope": scope})
        return result

    def _own(self, kinds: Any, name: str, block: Place | None) -> Iterator[Found]:
        for number in [kinds] if isinstance(kinds, int) else kinds:
            owner, records, *layout = self.entry["kinds"][number]
            record = records.get(name) or _unlisted(records, name)
            if record is not None:
                kind, units, vocabulary, dimensions = record
                yield Found(
                    Kind(kind),
                    None if units is None else tuple(units),
                    vocabulary,
                    dimensions,
                    owner,
                    tuple(map(bool, layout[0])) if layout else None,
                    *(block or (None, True)),
                )


def _unlisted(records: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any] | None:
    """A bias that the default configuration leaves out, or one more of a list of parameters."""
    if name == "bias" and "weight" in records:
        kind, units, vocabulary, _ = records["weight"]
        if Kind(kind) in MAPS and units is not None:
            return str(Kind.BIAS), [0], None if vocabulary is None else 0, 1
        return (str(Kind.BIAS), [], None, 1) if Kind(kind) is Kind.NORM else None
    return records.get("0") if name.isdigit() else None


def text_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A configuration, and those of its parts that are of a text model."""
    return [config, *filter(None, (part_of(config, path) for path in TEXT_PARTS))]


def said_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration ties head and embedding, by its top or its text part; None where it
    does not say."""
    found = (part.get("tie_word_embeddings") for part in text_parts(config))
    return next((said for said in found if isinstance(said, bool)), None)


def part_of(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The part of a configuration at a dotted path; an empty one where it is not there."""
    part: Any = config
    for key in path.split(".") if path else ():
        part = part.get(key) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else {}

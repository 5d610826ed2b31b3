"""One walk through a built model: its tree, its parts that have types of their own, its stacks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from magic_fast.models.built.modules import GATES, Place, records_of
from magic_fast.models.built.trees import Experts, Node, ambiguous, merge

_COUNTS = re.compile(r"layer|block|depth")
_NOT_COUNTS = re.compile(r"type|norm|id$|idx|index|window|first|start|interval|period|step|every")


@dataclass
class Visit:
    """What one model shows.

    Attributes:
        tree: its modules.
        stacks: path of a list of modules → the path of the part of the configuration, the field
            that counts them, if any, and the fields with one entry for each.
        parts: type, class and tree of each part that has a type of its own.
        types: the types of all parts that have one of their own.
    """

    tree: Node = field(default_factory=dict)
    stacks: dict[str, tuple[str, str | None, tuple[str, ...]]] = field(default_factory=dict)
    parts: list[tuple[str, str, Node]] = field(default_factory=list)
    types: set[str] = field(default_factory=set)


def configurations(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every part of a configuration with its path, the whole first."""
    from transformers import PretrainedConfig

    yield path, config
    for key, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig) and not key.startswith("_"):
            yield from configurations(value, f"{path}.{key}" if path else key)


class Walker:
    """Walks one model.

    Args:
        model: as it was built.
        words: the sizes of its vocabularies, which nothing else in it has.
        labels: the sizes of its classifiers' outputs.
        kind_of_part: (model type, class) → ``base`` or ``head`` where a part of that class has a
            type of its own, else None.
        base: path of the base model inside it, "" where it is one, None where it has none.
    """

    def __init__(
        self,
        model: Any,
        words: frozenset[int],
        labels: frozenset[int],
        kind_of_part: Callable[[str, str], str | None],
        base: str | None,
    ) -> None:
        self.model = model
        self.words = words
        self.labels = labels
        self.kind_of_part = kind_of_part
        self.base = base
        self.visit = Visit()
        self._paths = {id(part): path for path, part in configurations(model.config)}
        self._outputs = {
            id(output)
            for module in model.modules()
            for output in [_output_of(module)]
            if output is not None
        }
        self.visit.tree = self._node(model, "", model.config, "", Place(words=words, labels=labels))

    def _node(self, module: nn.Module, path: str, config: Any, name: str, place: Place) -> Node:
        node: Node = {}
        records = records_of(module, place)
        if records:
            node[""] = [(type(module).__name__, _experts(module), records)]
        children = list(module.named_children())
        starred = isinstance(module, nn.ModuleList) or _alike(module, children)
        if starred and path:
            self._note_stack(module, path, config)
        gates = any("expert" in child for child, _ in children)
        for key, child in children:
            inner = f"{path}.{key}" if path else key
            own = getattr(child, "config", None)
            part = self._part(child, own, config)
            if part is not None:
                node[key] = part
                continue
            inside = Place(
                name=key if not key.isdigit() else place.name,
                parent=type(module).__name__,
                words=self.words,
                labels=self.labels,
                output=id(child) in self._outputs,
                router=gates and key in GATES,
                outside=self._outside(inner),
            )
            tree = self._node(child, inner, own if id(own) in self._paths else config, key, inside)
            if tree:
                node[key] = tree
        numbers = [key for key in node if key.isdigit()] if starred else []
        if numbers:
            joined = functools.reduce(merge, (node[key] for key in numbers))
            if not ambiguous(joined):
                for key in numbers:
                    del node[key]
            node["*"] = joined  # beside the numbers: for more of them than there are here
        return node

    def _outside(self, path: str) -> bool:
        return self.base is None or (self.base != "" and not f"{path}.".startswith(f"{self.base}."))

    def _part(self, child: Any, own: Any, config: Any) -> Node | None:
        """A reference to the type of a part, whose own tree is noted."""
        if own is None or own is config or id(own) not in self._paths:
            return None
        path, model_type = self._paths[id(own)], own.model_type
        if getattr(child, "is_absent", False):
            return {"@": (path, model_type, "base")}
        kind = self.kind_of_part(model_type, type(child).__name__) if path else None
        if kind is None:
            return None
        self.visit.types.add(model_type)
        inside = "" if kind == "base" else None
        walker = Walker(child, self.words, self.labels, self.kind_of_part, inside)
        self.visit.parts += [
            (model_type, type(child).__name__, walker.visit.tree), *walker.visit.parts
        ]  # fmt: skip
        return {"@": (path, model_type, kind)}

    def _note_stack(self, stack: nn.Module, path: str, config: Any) -> None:
        """Which field counts a list of layers: one of that value whose name speaks of layers, of
        the encoder in an encoder and of the decoder in a decoder."""
        count = len(list(stack.children()))
        if count < 2 or not any(list(layer.children()) for layer in stack.children()):
            return
        known = sorted(vars(config).items())
        fields = [
            key
            for key, value in known
            if type(value) is int and value == count and _COUNTS.search(key)
            and not _NOT_COUNTS.search(key)
        ]  # fmt: skip
        side = next((s for s in ("decoder", "encoder") if s in path), "")
        fields.sort(key=lambda key: _rank(key, side))
        lists = tuple(
            key
            for key, value in known
            if isinstance(value, list | tuple) and len(value) == count and key[0] != "_"
        )
        if fields or any("layer" in key for key in lists):
            place = self._paths.get(id(config), "")
            field = fields[0] if fields else None
            self.visit.stacks.setdefault(_starred(path), (place, field, lists))


def _rank(key: str, side: str) -> tuple[bool, bool, bool, str]:
    other = {"encoder": "decoder", "decoder": "encoder"}.get(side, "coder")
    return other in key, bool(side) and side not in key, "hidden" not in key, key


def _starred(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _alike(module: nn.Module, children: list[tuple[str, nn.Module]]) -> bool:
    """A sequence of blocks of one class."""
    return (
        isinstance(module, nn.Sequential)
        and len(children) > 1
        and len({type(child) for _, child in children}) == 1
        and all(list(child.children()) for _, child in children)
    )


def _experts(module: Any) -> Experts | None:
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
        return None
    return module.is_transposed, module.is_concatenated, module.has_gate, module.has_bias


def _output_of(module: Any) -> Any:
    """The module that gives a model's logits over words, or None."""
    get = getattr(module, "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (AttributeError, NotImplementedError, TypeError):
        return None

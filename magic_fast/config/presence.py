"""Which model has which tensor, and what to say where one is missing."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from magic_fast.config.outputs import ModelView
from magic_fast.errors import CheckpointError
from magic_fast.models.matching import common_prefix

_LOG = logging.getLogger("magic_fast")
_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")


class Presence:
    """Looks names up in the models, each model's list read once; remembers what was missing."""

    def __init__(self, models: Mapping[str, ModelView]) -> None:
        self._models = models
        self._stored: dict[str, dict[str, None]] = {}
        self._missing: dict[tuple[str, str], str] = {}
        self._tied: set[tuple[str, str]] = set()
        self._patterns: dict[str, set[str]] = {}
        self._left_out: dict[str, frozenset[str]] = {}

    def only(self, names: Mapping[str, Collection[str]]) -> Presence:
        """The same models, of each of which only ``names[model]`` count as stored."""
        part = Presence(self._models)
        part._left_out = self._left_out
        for model, chosen in names.items():
            part._stored[model] = {n: None for n in self.stored(model) if n in chosen}
        return part

    def stored(self, model: str) -> dict[str, None]:
        """The names that ``model`` stores, in its order."""
        if model not in self._stored:
            self._stored[model] = dict.fromkeys(self._models[model].names())
        return self._stored[model]

    def has(self, name: str, model: str) -> bool:
        """Whether ``model`` stores ``name`` or has it tied to another tensor."""
        return name in self.stored(model) or self._models[model].has(name)

    def left_out(self, model: str) -> frozenset[str]:
        """As of `ModelView`, found once."""
        if model not in self._left_out:
            self._left_out[model] = self._models[model].left_out()
        return self._left_out[model]

    def is_derived(self, name: str, model: str) -> bool:
        """Whether ``name`` is a buffer that follows from the configuration of ``model``."""
        return self._models[model].is_derived(name)

    def is_of_base_alone(self, name: str, base: str, others: Iterable[str]) -> bool:
        """Whether none of ``others`` has the base's tensor ``name``, nor would need it.

        A file that has the same tensor of other layers or experts is not complete; buffers that
        follow from the configuration are nobody's own.
        """
        if any(self.has(name, other) for other in others) or self.is_derived(name, base):
            return False
        if not self._models[base].is_loaded(name):
            return True
        return not any(_pattern(name) in self._patterns_of(other) for other in others)

    def _patterns_of(self, model: str) -> set[str]:
        if model not in self._patterns:
            self._patterns[model] = {_pattern(name) for name in self.stored(model)}
        return self._patterns[model]

    def counted_stack(self, model: str) -> str | None:
        """As of `ModelView`."""
        return self._models[model].counted_stack()

    def config(self, model: str) -> Mapping[str, Any]:
        """Parsed ``config.json`` of ``model``."""
        return self._models[model].config

    def check(self, name: str, model: str, other_name: str, other: str) -> bool:
        """Whether ``model`` has ``name``, which ``other`` stores as ``other_name``.

        A lack is noted for :meth:`raise_missing`, unless the other model can do without it or it is
        not merged.
        """
        if name in self.stored(model):
            return True
        if self._models[model].has(name):
            self._note_tied(name, model, other)
            return True
        if not (
            self.is_derived(other_name, other)
            or other_name in self.left_out(other)
            or not self._models[other].is_loaded(other_name)
        ):
            as_in = other if name == other_name else f"{other_name} of {other}"
            self._missing.setdefault((model, name), as_in)
        return False

    def _note_tied(self, name: str, model: str, other: str) -> None:
        untied = self.config(other).get("tie_word_embeddings") is False
        if untied and (name, model) not in self._tied:
            self._tied.add((name, model))
            _LOG.warning(
                "%s is tied in %s and a tensor of its own in %s: where the output follows the "
                "former it stays tied.", name, model, other,
            )  # fmt: skip

    def raise_missing(self) -> None:
        """Raise CheckpointError for everything that :meth:`check` noted."""
        if not self._missing:
            return
        (model, name), as_in = min(self._missing.items())
        more = len(self._missing) - 1
        other = as_in if as_in in self._models else as_in.partition(" of ")[2]
        raise CheckpointError(
            f"missing tensor for {model}: expected {name} as in {as_in}, got no such tensor"
            f"{f' ({more} more are missing)' if more else ''}. {self._difference(model, other)}"
        )

    def _difference(self, model: str, other: str) -> str:
        """What differs between two models, and what to do."""
        names, others = self.stored(model), self.stored(other)
        prefix = common_prefix(others, names)
        if prefix is not None:
            few, many = (model, other) if prefix[0] else (other, model)
            return (
                f"All names of {many} begin with the prefix {''.join(prefix)!r}, which those of "
                f"{few} lack, and shapes differ. Merge models of one architecture."
            )
        extra = [n for n in names if n not in others and not self.is_derived(n, model)]
        if not extra:
            return (
                "Check that all checkpoints are complete and of one architecture, or say with "
                "include or exclude what is merged."
            )
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        return (
            f"{model} has {extra[0]}{more} instead, which {other} lacks: another architecture, or "
            "other names for it that are not known. Merge models of one architecture."
        )


def _pattern(name: str) -> str:
    return _NUMBERS.sub("*", name)

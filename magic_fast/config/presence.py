"""Which model has which tensor, and what to say where one is missing."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from magic_fast.config.outputs import ModelView
from magic_fast.errors import CheckpointError

_LOG = logging.getLogger("magic_fast")


class Presence:
    """Looks names up in the models, each model's list read once; remembers what was missing."""

    def __init__(self, models: Mapping[str, ModelView]) -> None:
        self._models = models
        self._stored: dict[str, dict[str, None]] = {}
        self._missing: dict[tuple[str, str], str] = {}
        self._tied: set[tuple[str, str]] = set()

    def only(self, names: Mapping[str, Collection[str]]) -> Presence:
        """The same models, of each of which only ``names[model]`` count as stored."""
        part = Presence(self._models)
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

    def is_derived(self, name: str, model: str) -> bool:
        """Whether ``name`` is a buffer that follows from the configuration of ``model``."""
        return self._models[model].is_derived(name)

    def config(self, model: str) -> Mapping[str, Any]:
        """Parsed ``config.json`` of ``model``."""
        return self._models[model].config

    def check(self, name: str, model: str, other_name: str, other: str) -> bool:
        """Whether ``model`` has ``name``, which ``other`` stores as ``other_name``.

        A lack is noted for :meth:`raise_missing`, unless the other model can do without it.
        """
        if name in self.stored(model):
            return True
        if self._models[model].has(name):
            self._note_tied(name, model, other)
            return True
        if not self.is_derived(other_name, other) and self._models[other].is_loaded(other_name):
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
        raise CheckpointError(
            f"missing tensor for {model}: expected {name} as in {as_in}, got no such tensor"
            f"{f' ({more} more are missing)' if more else ''}. Check that all checkpoints are "
            "complete and of one architecture."
        )

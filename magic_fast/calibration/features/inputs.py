"""From what a loader yields to what a model is called with."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from magic_fast.calibration.features.batches import batches_of, shapes_of
from magic_fast.errors import InputError, MagicFastError

Inputs = Callable[[Any], Any]

_LOG = logging.getLogger("magic_fast")
_FIRST = "inputs=lambda batch: batch[0]"


def called_with(
    data: Mapping[str, Any],
    inputs: Inputs | None,
    model: nn.Module,
    warnings: list[str] | None = None,
) -> dict[str, _Batches]:
    """Task → batches that say without doubt what the model is called with: ``**batch`` of a
    mapping, ``*batch`` of a tuple or list, else ``batch``.

    Without ``inputs`` a tuple or list fills the arguments that the model's ``forward`` requires,
    and never one that may be left out: what more it has, as labels, is left and said.

    Args:
        data: task → batches, as users give them.
        inputs: a function from a batch to those arguments.
        model: whose ``forward`` tells what it requires.
        warnings: takes what is said.

    Raises:
        InputError: ``inputs`` is no function; later, of each batch, what it makes is nothing to
            call a model with, or without ``inputs`` a tuple does not fit.
    """
    if inputs is not None and not callable(inputs):
        raise InputError(
            "inputs: expected a function from a batch to the model's arguments, got "
            f"{type(inputs).__name__}. {_FIRST} takes the first of what a loader yields."
        )
    said = [] if warnings is None else warnings
    return {task: _Batches(data, task, inputs, model, said) for task in data}


@dataclass(frozen=True)
class _Batches:
    """The batches of one task, read anew each time as ``data`` itself would be."""

    data: Mapping[str, Any]
    task: str
    inputs: Inputs | None
    model: nn.Module
    said: list[str]

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(batches_of(self.data, self.task)):
            where = f"batch {number} of task {self.task!r}"
            if self.inputs is not None:
                yield _made(self.inputs, batch, where)
            elif isinstance(batch, tuple | list) and len(batch) > 1:
                yield self._required(batch, where)
            else:
                yield batch

    def _required(self, batch: Any, where: str) -> Any:
        """As much of a tuple as the model requires."""
        least, most = arguments_taken(self.model)
        if not 0 < least <= len(batch) <= most:
            raise InputError(
                f"{where}: expected the model's arguments, got {shapes_of(batch)}, which may be "
                "inputs and labels. Say what the model is called with by inputs=, a function of "
                f"the batch ({_FIRST}), or make it a mapping of the model's argument names."
            )
        if len(batch) > least:
            text = (
                f"data of task {self.task!r}: the model is called with {least} of a batch's "
                f"{len(batch)} values, as many as its forward requires; the others may be labels. "
                "inputs= says what it is called with"
            )
            if text not in self.said:
                _LOG.warning("%s", text)
                self.said.append(text)
        return batch[:least]


def _made(inputs: Inputs, batch: Any, where: str) -> Any:
    try:
        found = inputs(batch)
    except MagicFastError:
        raise
    except Exception as error:  # of code that is the user's own
        raise InputError(
            f"inputs for {where}: expected the model's arguments, got {type(error).__name__}: "
            f"{error}. The batch was {shapes_of(batch)}."
        ) from error
    if found is None or isinstance(found, str | bytes):
        raise InputError(
            f"inputs for {where}: expected the model's arguments as a mapping, a tuple or one "
            f"value, got {'None' if found is None else 'a string'}."
        )
    return found


def arguments_taken(model: nn.Module) -> tuple[int, int]:
    """How many arguments the model's ``forward`` requires by their places, and how many it takes;
    (0, 0) where that is not known."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return 0, 0
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return 0, 0
    known = [p for p in parameters if p.kind in places]
    return sum(p.default is inspect.Parameter.empty for p in known), len(known)


def as_made(batch: Any) -> Any:
    """``inputs`` of batches that were made for the model before."""
    return batch

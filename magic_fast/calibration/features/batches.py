"""Calibration data: {task: batches}, checked, and a batch's way into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.errors import InputError, MagicFastError


def batches_of(data: Mapping[str, Any], task: str) -> Iterator[Any]:
    """The batches of one task, each with something in it. One tensor or mapping is one batch."""
    value = data[task]
    if callable(value) and not isinstance(value, Tensor | Mapping):
        value = value()
    if isinstance(value, Tensor | Mapping):
        value = [value]
    if type(value) is tuple and len(value) > 1 and all(isinstance(v, Tensor) for v in value):
        raise InputError(
            f"data of task {task!r}: expected an iterable of batches, got {shapes_of(value)}, "
            "which may be one batch of inputs and labels, or several batches. Pass a list of "
            "batches."
        )
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise InputError(
            f"data of task {task!r}: expected an iterable of batches or a callable that gives one, "
            f"got {type(value).__name__}."
        )
    number = -1
    for number, batch in enumerate(value):
        if _is_empty(batch):
            raise InputError(
                f"batch {number} of task {task!r}: expected at least one sample, got an empty one."
            )
        yield batch
    if number < 0:
        raise InputError(
            f"data of task {task!r}: expected at least one batch, got none. An iterator that was "
            "used before gives nothing: pass a list, or a callable."
        )


def _is_empty(batch: Any) -> bool:
    if isinstance(batch, Tensor):
        return batch.numel() == 0
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, tuple | list):
        return not values or any(isinstance(v, Tensor) and not v.numel() for v in values)
    return False


def experts_by_task(
    num_experts: int, names: Sequence[str] | None, tasks: Sequence[str]
) -> list[int]:
    """The expert of each task: by name where the experts have names, else in order.

    Raises:
        InputError: a task has no expert, or an expert no data.
    """
    if names is None:
        if len(tasks) != num_experts:
            raise InputError(
                f"data: expected one task for each of {num_experts} experts, got {len(tasks)} "
                f"({', '.join(tasks)}). Tasks and experts go together in order, or by name where "
                "experts is a mapping."
            )
        return list(range(num_experts))
    for name in names:
        if name not in tasks:
            raise InputError(
                f"data of task {name!r}: expected samples for every expert, got none. "
                f"The tasks with data: {', '.join(tasks) or 'none'}."
            )
    for task in tasks:
        if task not in names:
            raise InputError(
                f"data of task {task!r}: expected one of the experts {', '.join(names)}, got a "
                "task without an expert."
            )
    return [list(names).index(task) for task in tasks]


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def run_batch(model: nn.Module, batch: Any, task: str, number: int) -> Any:
    """``model(**batch)``, ``model(*batch)`` or ``model(batch)`` for a mapping, a tuple, else."""
    args, kwargs = arguments_of(batch)
    with refusals(task, number, f"It was called with {_called(batch)}. "):
        return model(*args, **kwargs)


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


@contextmanager
def refusals(task: str, number: int, called: str = "") -> Iterator[None]:
    """What a model's code raises at a batch that it cannot take, as an error of the input;
    ``called``: how it was called."""
    try:
        yield
    except MagicFastError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise InputError(
            f"batch {number} of task {task!r}: expected what the model takes, got its refusal, "
            f"{_words(error)}. {called}Is the data of the right modality?"
        ) from error


@contextmanager
def faults(layer: str, task: str, number: int, own: Callable[[], object]) -> Iterator[None]:
    """What is raised while a layer is looked at by itself. Where ``own``, its own call, raises
    nothing, the data is not to blame."""
    try:
        yield
    except MagicFastError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        with refusals(task, number):
            own()
        raise InputError(
            f"layer {layer!r} at batch {number} of task {task!r}: expected one that can be run "
            f"with the weights of base and experts, got {_words(error)}. The layer itself takes "
            "the batch, so the data is not to blame: please report it."
        ) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).rstrip('.')}"


def _called(batch: Any) -> str:
    if isinstance(batch, Mapping):
        fields = ", ".join(f"{k}={shapes_of(v)}" for k, v in batch.items())
        return f"{len(batch)} named argument{'s' * (len(batch) != 1)}, {fields}"
    if isinstance(batch, tuple | list):
        one = len(batch) == 1
        return (
            f"{len(batch)} argument{'s' * (not one)}, {', '.join(map(shapes_of, batch))}, of a "
            f"{type(batch).__name__} that was unpacked"
        )
    return f"1 argument, {shapes_of(batch)}"


def shapes_of(value: Any) -> str:
    """A batch in words: the shapes of its tensors."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, tuple | list):
        of = ", ".join(map(shapes_of, value[:_SHOWN])) + ", …" * (len(value) > _SHOWN)
        tensors = " tensors" if value and all(isinstance(v, Tensor) for v in value) else ""
        return f"a {type(value).__name__} of {len(value)}{tensors} ({of})"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value))}"
    return type(value).__name__


_SHOWN = 6

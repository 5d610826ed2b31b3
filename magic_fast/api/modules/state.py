"""A module's tensors by its own names, and a new module that takes others."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.errors import InputError, InternalError

_LOG = logging.getLogger("magic_fast")


def tensors_of(module: nn.Module) -> OrderedDict[str, Tensor]:
    """Parameters and persistent buffers under all of their names, in the order of a state dict.

    They are the module's own memory, whatever hooks make of ``state_dict()``. The result has a
    state dict's ``_metadata``.
    """
    found: OrderedDict[str, Tensor] = OrderedDict()
    metadata: OrderedDict[str, Any] = OrderedDict()
    for prefix, one in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        metadata[prefix] = {"version": one._version}
        for name, parameter in one._parameters.items():
            if parameter is not None:
                found[dot + name] = parameter
        for name, buffer in one._buffers.items():
            if buffer is not None and name not in one._non_persistent_buffers_set:
                found[dot + name] = buffer
    found._metadata = metadata  # type: ignore[attr-defined]
    return found


def values_of(module: nn.Module) -> OrderedDict[str, Tensor]:
    """:func:`tensors_of` without gradients, to read. State of other kinds is not merged, as a
    warning says."""
    for prefix, one in module.named_modules():
        if type(one).get_extra_state is not nn.Module.get_extra_state:
            _LOG.warning("extra state of '%s' is not merged: it stays as it is", prefix)
    own = tensors_of(module)
    found = OrderedDict((name, x.detach()) for name, x in own.items())
    found._metadata = own._metadata  # type: ignore[attr-defined]
    return found


def place_of(x: Tensor) -> tuple[Any, ...]:
    """The memory that a tensor is a view of, and how."""
    return x.device, x.data_ptr(), x.dtype, tuple(x.shape), x.stride()


def module_like(model: nn.Module, written: Collection[str]) -> nn.Module:
    """A copy of a module whose parameters of the names ``written`` are memory still to be written:
    no second read of the weights. What is one memory stays one; all else is copied.

    Raises:
        InputError: it cannot be copied.
    """
    memo: dict[int, Any] = {}
    blanks: dict[tuple[Any, ...], Tensor] = {}
    chosen = {id(x) for name, x in tensors_of(model).items() if name in written}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and id(parameter) in chosen:
            key = place_of(parameter) if parameter.numel() else (id(parameter),)
            if key not in blanks:
                blanks[key] = torch.empty_like(parameter.detach())
            memo[id(parameter)] = nn.Parameter(blanks[key], requires_grad=parameter.requires_grad)
    made = copied(model, memo)
    refuse_blanks(made, {x.data_ptr() for x in blanks.values() if x.numel()}, written)
    return made


def refuse_blanks(made: nn.Module, blanks: Collection[int], written: Collection[str]) -> None:
    """Raises where a tensor that nobody will write is memory without values.

    Args:
        blanks: addresses of such memory.
        written: names that are written.
    """
    filled = {x.data_ptr() for name, x in tensors_of(made).items() if name in written}
    for name, x in tensors_of(made).items():
        if x.numel() and x.data_ptr() in blanks and x.data_ptr() not in filled:
            raise InternalError(
                f"tensor '{name}' of the merged module: expected values, got memory that nothing "
                "was written to. This is our fault: please report it."
            )


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy.

    Raises:
        InputError: the module does not allow it.
    """
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:  # tensors that were computed, locks, handles
        raise InputError(
            f"{type(model).__name__}: expected a module that can be copied, got: "
            f"{str(error).rstrip('.')}. Merge state dicts, or use merge_into()."
        ) from error


def as_state_dict(state: Mapping[str, Tensor], like: object) -> dict[str, Tensor]:
    """A dict of tensors; an ordered one with the ``_metadata`` of ``like`` where that has one."""
    metadata = getattr(like, "_metadata", None)
    if metadata is None:
        return dict(state)
    found: OrderedDict[str, Tensor] = OrderedDict(state)
    found._metadata = metadata  # type: ignore[attr-defined]
    return found


def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module with other values, in its own dtypes."""
    made = copied(model)
    with torch.no_grad():
        for name, x in tensors_of(made).items():
            x.copy_(values[name])
    return made

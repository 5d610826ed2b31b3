"""Modules as models: which of their tensors are one, and a new module that takes a merge."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.api.tensors import Tensors
from magic_fast.errors import InputError


def model_type_of(model: object) -> str | None:
    """transformers' name of the architecture, or None."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether both are one memory, looked at in one way."""
    return a is b or _place(a) == _place(b)


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.device, x.data_ptr(), x.dtype, tuple(x.shape), x.stride()


def tied_groups(state: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The names of a state dict, those of one memory together, in its order."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        key = _place(tensor) if tensor.numel() and tensor.data_ptr() else name  # no address
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def first_of_tied(
    models: Iterable[tuple[str, Tensors]], groups: Sequence[tuple[str, ...]]
) -> list[tuple[str, dict[str, Tensor]]]:
    """The models with one tensor for each group of tied names, under its first name.

    A model may lack some names of a group (files hold tied weights once); those that it has must
    agree.

    Raises:
        InputError: a model has no name of a group, a name of none, or values that differ in one.
    """
    reduced = []
    for what, model in models:
        if isinstance(model, Tensor):
            raise InputError(f"{what}: expected a module or a state dict, got a tensor.")
        rest = dict(model)
        own: dict[str, Tensor] = {}
        for names in groups:
            present = [n for n in names if n in model]
            if not present:
                raise InputError(
                    f"tensor '{names[0]}' in {what}: expected one as in the model, got none. "
                    "All models must have the same architecture."
                )
            first = model[present[0]]
            for other in present[1:]:
                if not same_tensor(first, model[other]) and not torch.equal(first, model[other]):
                    raise InputError(
                        f"tensors '{present[0]}' and '{other}' in {what}: expected the same "
                        "values, because they are tied in the model, got different ones. Untie "
                        "them in the model, or merge state dicts."
                    )
            own[names[0]] = first
            for n in present:
                del rest[n]
        if rest:
            raise InputError(
                f"tensor '{next(iter(rest))}' in the model: expected one as in {what}, got none. "
                "All models must have the same architecture."
            )
        reduced.append((what, own))
    return reduced


def module_like(model: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are memory still to be written: no second read of the
    weights. Tied ones stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:  # others know themselves how they are copied
            blank = torch.empty_like(parameter.detach())
            memo[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:  # tensors that were computed, locks, handles
        raise InputError(
            f"{type(model).__name__}: expected a module that can be copied, got: "
            f"{str(error).rstrip('.')}. Merge state dicts, or use merge_into()."
        ) from error

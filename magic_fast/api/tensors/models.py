"""Tensors, state dicts and modules as models: one form for all of them, which of a module's tensors
are one, and a new module that takes a merge."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from magic_fast.api.modules.names import BUFFERS, kind_of, renamed, with_buffers
from magic_fast.api.modules.plain import refuse_adapters, refuse_odd
from magic_fast.api.modules.state import place_of, values_of
from magic_fast.errors import InputError
from magic_fast.models import Kind

_LOG = logging.getLogger("magic_fast")

Tensors: TypeAlias = Tensor | Mapping[str, Tensor]


def state_dict_of(value: object, what: str) -> Tensors:
    """A tensor, a mapping of tensors, or the tensors of a module.

    Raises:
        InputError: another kind, or a tensor without plain memory.
    """
    if isinstance(value, torch.nn.Module):
        value = values_of(value)
    if isinstance(value, Tensor):
        refuse_odd(value, what)
        return value
    if isinstance(value, Mapping):
        for name, tensor in value.items():
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"{what}['{name}']: expected a torch.Tensor, got {type(tensor).__name__}."
                )
            refuse_odd(tensor, f"tensor '{name}' in {what}")
        return value
    raise InputError(
        f"{what}: expected a torch.Tensor, a state dict or a module, got {type(value).__name__}."
    )


def models_of(values: object, what: str) -> list[Tensors]:
    """A list of tensors or state dicts, or a mapping of such models by name; one stacked [K, …]
    tensor is taken apart without a copy."""
    if isinstance(values, Mapping) and not any(isinstance(v, Tensor) for v in values.values()):
        values = list(values.values())
    if isinstance(values, Tensor):
        refuse_odd(values, what)
        if values.dim() == 0:
            raise InputError(
                f"{what}: expected a list or a stacked [K, …] tensor, got a 0-d tensor."
            )
        if not values.shape[0]:
            raise InputError(f"{what}: expected at least one, got none.")
        return list(values.unbind(0))
    if isinstance(values, Mapping) or not isinstance(values, Sequence):
        raise InputError(
            f"{what}: expected a list of tensors or of state dicts, or a mapping of named models, "
            f"got {type(values).__name__}."
        )
    if not values:
        raise InputError(f"{what}: expected at least one, got none.")
    return [state_dict_of(v, f"{what}[{k}]") for k, v in enumerate(values)]


def labelled(base: Any, experts: Sequence[Tensors]) -> list[tuple[str, Tensors]]:
    """(what messages call it, model) of the base, if there is one, and the experts."""
    first = [] if base is None else [("base", state_dict_of(base, "base"))]
    return first + [(f"experts[{k}]", e) for k, e in enumerate(experts)]


def without(
    models: Sequence[tuple[str, Tensors]], names: Collection[str]
) -> list[tuple[str, Tensors]]:
    """The models without some of their tensors."""
    return [
        (what, {n: x for n, x in model.items() if n not in names})
        if isinstance(model, Mapping)
        else (what, model)
        for what, model in models
    ]


def destination(out: Any, name: str, bare: bool, like: str) -> Tensor | None:
    """Where a tensor of the result goes; None: into new memory. ``like``: what ``out`` is like, for
    messages."""
    if out is None:
        return None
    if bare:
        if not isinstance(out, Tensor):
            raise InputError(f"out: expected a tensor like {like}, got {type(out).__name__}.")
        return out
    if not isinstance(out, Mapping) or name not in out:
        raise InputError(f"out: expected a dict with a tensor for '{name}', got none.")
    target: Tensor = out[name]
    return target


class Named:
    """Models as rows of named tensors; a bare tensor is the one tensor named ''."""

    def __init__(self, models: Sequence[tuple[str, Tensors]]) -> None:
        if not models:
            raise InputError("experts: expected at least one, got none.")
        self.bare = isinstance(models[0][1], Tensor)
        self._dicts: list[tuple[str, Mapping[str, Tensor]]] = []
        for what, model in models:
            if isinstance(model, Tensor) != self.bare:
                raise InputError(
                    f"{what}: expected {'a tensor' if self.bare else 'a state dict'} like "
                    f"{models[0][0]}, "
                    f"got {'a tensor' if isinstance(model, Tensor) else 'a state dict'}."
                )
            self._dicts.append((what, {"": model} if isinstance(model, Tensor) else model))
        if not self.bare:
            self._dicts = with_buffers(renamed(self._dicts))
        self._check_names()

    def _check_names(self) -> None:
        first, reference = self._dicts[0]
        refuse_adapters(reference, first)
        for what, tensors in self._dicts[1:]:
            for name in reference:
                if name not in tensors:
                    raise InputError(
                        f"tensor '{name}' in {what}: expected one as in {first}, got none. "
                        "All models must have the same architecture."
                    )
            for name in tensors:
                if name not in reference:
                    raise InputError(
                        f"tensor '{name}' in {first}: expected one as in {what}, got none. "
                        "All models must have the same architecture."
                    )

    @property
    def models(self) -> list[Mapping[str, Tensor]]:
        """Each model's tensors by the names of the first."""
        return [tensors for _, tensors in self._dicts]

    @property
    def names(self) -> list[str]:
        return list(self._dicts[0][1])

    @property
    def first(self) -> Mapping[str, Tensor]:
        """The tensors of the first model by their names; none of a bare tensor."""
        return {} if self.bare else self._dicts[0][1]

    def row(self, name: str) -> list[Tensor]:
        """The tensor of that name in every model, in order."""
        return [tensors[name] for _, tensors in self._dicts]

    def floating(self, has_base: bool) -> Iterator[tuple[str, Tensor | None, list[Tensor]]]:
        """(name, the first model's tensor where that is a base, the others') of what is merged."""
        for name in self.names:
            row = self.row(name)
            if row[0].is_floating_point():
                yield name, row.pop(0) if has_base else None, row

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(model, name, tensor) of everything."""
        for what, tensors in self._dicts:
            for name, tensor in tensors.items():
                yield what, name, tensor

    def copied(self, name: str) -> Tensor | None:
        """The one value of a tensor that is not merged, the first model's: an integer or boolean
        one, on which all models must agree, a counter, or a buffer that is the same in all models,
        however infinite it is. None: it is to be merged."""
        row = self.row(name)
        first = row[0]
        if first.is_complex():
            raise InputError(f"dtype of '{name}': expected a real dtype, got {first.dtype}.")
        kind = kind_of(name, first)
        if first.is_floating_point() and kind not in BUFFERS:
            return None
        for (what, _), other in zip(self._dicts[1:], row[1:], strict=True):
            if other.dtype == first.dtype and torch.equal(other, first):
                continue
            if kind is Kind.COUNTER:
                _LOG.warning("counter %s stays as in %s", name, self._dicts[0][0])
                return first
            if first.is_floating_point():
                return None
            raise InputError(
                f"integer tensor '{name}' in {what}: expected the values of "
                f"{self._dicts[0][0]}, got others. Integer tensors are not merged; they must "
                "agree."
            )
        return first


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether both are one memory, looked at in one way."""
    return a is b or place_of(a) == place_of(b)


def tied_groups(state: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The names of a state dict, those of one memory together, in its order."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        key = place_of(tensor) if tensor.numel() and tensor.data_ptr() else name  # no address
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def first_of_tied(
    models: Iterable[tuple[str, Tensors]],
    groups: Sequence[tuple[str, ...]],
    kept: Collection[str] = (),
) -> list[tuple[str, dict[str, Tensor]]]:
    """The models with one tensor for each group of tied names, under its first name.

    A model may lack some names of a group (files hold tied weights once); those that it has must
    agree. Of groups whose first name is in ``kept`` only the first model's are looked at.

    Raises:
        InputError: a model has no name of a group, a name of none, or values that differ in one.
    """
    reduced: list[tuple[str, dict[str, Tensor]]] = []
    whole: list[tuple[str, Mapping[str, Tensor]]] = []
    for what, model in models:
        if isinstance(model, Tensor):
            raise InputError(f"{what}: expected a module or a state dict, got a tensor.")
        whole.append((what, model))
    own_names = [("the model", dict.fromkeys(n for names in groups for n in names))]
    for what, model in renamed([*own_names, *whole])[1:]:  # type: ignore[list-item]
        rest = dict(model)
        own: dict[str, Tensor] = {}
        for names in groups:
            present = [n for n in names if n in model]
            if names[0] in kept and reduced:
                for n in present:
                    del rest[n]
                continue
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

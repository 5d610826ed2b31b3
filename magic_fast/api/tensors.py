"""Tensors in, tensors out; state dicts in, state dicts out: one form for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from magic_fast.errors import InputError

Tensors: TypeAlias = Tensor | Mapping[str, Tensor]


def state_dict_of(value: object, what: str) -> Tensors:
    """A tensor, a mapping of tensors, or the state dict of a module."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()  # its extra state, where there is some, is no tensor
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        for name, tensor in value.items():
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"{what}['{name}']: expected a torch.Tensor, got {type(tensor).__name__}."
                )
        return value
    raise InputError(
        f"{what}: expected a torch.Tensor, a state dict or a module, got {type(value).__name__}."
    )


def models_of(values: object, what: str) -> list[Tensors]:
    """A list of tensors or state dicts; one stacked [K, …] tensor is taken apart without a copy."""
    if isinstance(values, Tensor):
        if values.dim() == 0:
            raise InputError(
                f"{what}: expected a list or a stacked [K, …] tensor, got a 0-d tensor."
            )
        if not values.shape[0]:
            raise InputError(f"{what}: expected at least one, got none.")
        return list(values.unbind(0))
    if isinstance(values, Mapping) or not isinstance(values, Sequence):
        raise InputError(
            f"{what}: expected a list of tensors or of state dicts, got {type(values).__name__}."
        )
    if not values:
        raise InputError(f"{what}: expected at least one, got none.")
    return [state_dict_of(v, f"{what}[{k}]") for k, v in enumerate(values)]


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
        self._check_names()

    def _check_names(self) -> None:
        first, reference = self._dicts[0]
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
    def names(self) -> list[str]:
        return list(self._dicts[0][1])

    def row(self, name: str) -> list[Tensor]:
        """The tensor of that name in every model, in order."""
        return [tensors[name] for _, tensors in self._dicts]

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(model, name, tensor) of everything."""
        for what, tensors in self._dicts:
            for name, tensor in tensors.items():
                yield what, name, tensor

    def copied(self, name: str) -> Tensor | None:
        """For an integer or boolean tensor: the one value all models agree on. None: it is to be
        merged."""
        row = self.row(name)
        if row[0].is_floating_point():
            return None
        if row[0].is_complex():
            raise InputError(f"dtype of '{name}': expected a real dtype, got {row[0].dtype}.")
        for (what, _), other in zip(self._dicts[1:], row[1:], strict=True):
            if other.dtype != row[0].dtype or not torch.equal(other, row[0]):
                raise InputError(
                    f"integer tensor '{name}' in {what}: expected the values of "
                    f"{self._dicts[0][0]}, "
                    "got others. Integer tensors are not merged; they must agree."
                )
        return row[0]

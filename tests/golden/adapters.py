"""What an adapter is: the public calls that answer one operation of a manifest.

An adapter takes (case, backend, wide) and returns outputs by name. ``wide`` asks for the result in
float32 whatever the inputs' dtype: that one is held to the strict tolerance of ``out_f32``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from golden.golden_case import GoldenCase
from magic_fast import ops
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe

Adapter = Callable[[GoldenCase, str, bool], dict[str, Tensor]]

#: operation → adapter; and the operations that are plain functions, on one backend
ADAPTERS: dict[str, Adapter] = {}
TORCH_ONLY: set[str] = set()


class NotYet(Exception):
    """This variant of an operation has no implementation yet."""


def adapter(*operations: str, torch_only: bool = False) -> Callable[[Adapter], Adapter]:
    """Registers the adapter of one or more operations."""

    def register(function: Adapter) -> Adapter:
        for operation in operations:
            assert operation not in ADAPTERS, operation
            ADAPTERS[operation] = function
            if torch_only:
                TORCH_ONLY.add(operation)
        return function

    return register


def target(like: Tensor, wide: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An empty ``out`` like the given tensor; float32 where the result is wanted wide."""
    return torch.empty_like(like, dtype=torch.float32 if wide else dtype or like.dtype)


def upcast(x: Tensor, wide: bool) -> Tensor:
    return x.float() if wide and x.dtype != torch.float64 else x


def run_recipe(
    experts: Sequence[Tensor], recipe: Recipe, backend: str, wide: bool = False, **fields: Any
) -> Tensor:
    """Δ of one tensor by a recipe of our own."""
    out = target(experts[0], wide)
    ops.merge([Job(None, list(experts), recipe, out, **fields)], backend=backend)
    return out

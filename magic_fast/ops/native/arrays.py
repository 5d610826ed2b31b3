"""Arrays as the native core takes them: addresses and dtype codes. Only addresses go down, so torch
is never imported here for a caller that has none."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

from magic_fast.ops.job import Array, View
from magic_fast.recipe.codes import DTYPES


def code_of(array: Array) -> int | None:
    """Dtype code of the C surface, or None."""
    return DTYPES[array.dtype]


def address_of(array: Array | None) -> int:
    """Address of the first element; 0 for None."""
    if array is None:
        return 0
    address: int = array.ptr if isinstance(array, View) else array.data_ptr()
    return address


def numel_of(array: Array) -> int:
    n: int = array.numel if isinstance(array, View) else array.numel()
    return n


def pointers_of(arrays: Sequence[Array]) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Addresses and dtype codes: what a batch of small tensors spends its time on in Python."""
    codes = tuple([DTYPES[a.dtype] for a in arrays])
    if any([type(a) is View for a in arrays]):
        return tuple([address_of(a) for a in arrays]), codes
    return tuple([a.data_ptr() for a in arrays]), codes


def doubles(like: Array, *shape: int) -> tuple[Any, int]:
    """A float64 array of ``shape`` and its address: a torch tensor for torch callers, else a
    memoryview."""
    if not isinstance(like, View):
        import torch

        tensor = torch.empty(shape, dtype=torch.float64)
        return tensor, tensor.data_ptr()
    values = array("d", bytes(8 * math.prod(shape)))
    view = memoryview(values).cast("B")
    return view.cast("d", shape) if math.prod(shape) else view, values.buffer_info()[0]

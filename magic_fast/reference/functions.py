"""Calls of the functions that users register as calibrations, with their results checked."""

from __future__ import annotations

import torch
from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.recipe import RowFunction


def coefficients(function: RowFunction, inputs: tuple[Tensor, ...], count: int) -> Tensor:
    """ξ by the function, float64 [count].

    Raises:
        InputError: the function fails, or does not return ``count`` floating numbers.
    """
    found = _called(function, inputs)
    right = tuple(found.shape) == (count,) or (count == 1 and found.numel() == 1)
    if not (right and found.is_floating_point()):
        what = "one floating number" if count == 1 else f"floating numbers of shape ({count},)"
        raise _fault(function, what, _described(found))
    return found.to(device=inputs[-1].device, dtype=torch.float64).reshape(count)


def calibrated_change(function: RowFunction, taus: Tensor, change: Tensor) -> Tensor:
    """The calibrated change by the function, of the shape and dtype of ``change``.

    Raises:
        InputError: the function fails, or returns another shape, or what is not finite where all
            its inputs are.
    """
    found = _called(function, (taus, change))
    if found.shape != change.shape or not found.is_floating_point():
        what = f"a floating tensor of shape {tuple(change.shape)}"
        raise _fault(function, what, _described(found))
    if not bool(torch.isfinite(found).all()):
        if bool(torch.isfinite(taus).all()) and bool(torch.isfinite(change).all()):
            raise _fault(function, "finite values", "NaN or infinity from finite ones")
    return found.to(change)


def refuse_nan(function: RowFunction, raw: Tensor, usable: Tensor) -> None:
    """Raises:
    InputError: a row with a length and a direction has no finite ξ.
    """
    bad = ~torch.isfinite(raw) & usable
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise _fault(function, "finite coefficients", f"{float(raw[row])} in row {row}")


def _called(function: RowFunction, inputs: tuple[Tensor, ...]) -> Tensor:
    versions = [x._version for x in inputs]
    try:
        found = torch.as_tensor(function(*inputs))
    except Exception as error:  # of any kind: it is code of others
        raise _fault(
            function, "a function that runs", f"{type(error).__name__}: {error}"
        ) from error
    if [x._version for x in inputs] != versions:
        raise _fault(function, "a function that leaves its inputs alone", "one that writes to them")
    return found


def _described(found: Tensor) -> str:
    return f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"


def _fault(function: RowFunction, expected: str, got: str) -> InputError:
    label = f"'{function.tensor}'" if function.tensor else "the tensor"
    return InputError(
        f"calibration '{function.name}' for {label}: expected {expected}, got {got}. Correct the "
        "function that is registered under this name."
    )

"""Validation of a job, once, before a backend sees it. Backends may assume what is checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from magic_fast.errors import InputError
from magic_fast.ops.job import Job
from magic_fast.recipe import TrimRule

_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_WORDS = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


class _Words(dict[object, str]):
    """By safetensors' word or dtype of torch, which is met once and kept."""

    def __missing__(self, dtype: object) -> str:
        word = str(dtype)
        self[dtype] = word = _TORCH_WORDS.get(word, word)
        return word


_WORDS = _Words()


def dtype_word(array: Any) -> str:
    """safetensors' word for the dtype of a torch tensor or a View; other dtypes keep torch's
    word."""
    return _WORDS[array.dtype]


def _label(job: Job) -> str:
    return f"'{job.name}'" if job.name else "the tensor"


def extent_of(array: Any) -> tuple[int, int]:
    """[first, last) byte addresses that the array touches."""
    if hasattr(array, "ptr"):
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}[array.dtype]
        return array.ptr, array.ptr + array.numel * size
    if array.is_contiguous():
        return (start := array.data_ptr()), start + array.nbytes
    if array.numel() == 0:
        return 0, 0
    span = sum((n - 1) * abs(s) for n, s in zip(array.shape, array.stride(), strict=True)) + 1
    return array.data_ptr(), array.data_ptr() + span * array.element_size()


def _check_masks(job: Job, masks: Sequence[Any] | None, what: str, allow_none: bool) -> None:
    if masks is None:
        return
    if len(masks) != len(job.experts):
        raise InputError(
            f"{what} for {_label(job)}: expected one per expert ({len(job.experts)}), got "
            f"{len(masks)}."
        )
    for k, mask in enumerate(masks):
        if mask is None and allow_none:
            continue
        if mask is None or dtype_word(mask) not in ("U8", "BOOL"):
            got = "None" if mask is None else str(mask.dtype)
            raise InputError(
                f"{what} of expert {k} for {_label(job)}: expected bool or uint8, got {got}."
            )
        if tuple(mask.shape) != tuple(job.experts[0].shape):
            raise InputError(
                f"{what} of expert {k} for {_label(job)}: expected shape "
                f"{tuple(job.experts[0].shape)}, got {tuple(mask.shape)}."
            )


def check(job: Job) -> None:
    """Raises :class:`InputError` naming the tensor where shapes, dtypes, devices, masks or memory
    do not fit."""
    experts, recipe = job.experts, job.recipe
    if len(experts) != recipe.num_experts:
        raise InputError(
            f"experts for {_label(job)}: expected {recipe.num_experts} (one per weight), got "
            f"{len(experts)}."
        )
    named = [(f"expert {k}", e) for k, e in enumerate(experts)]
    if job.base is not None:
        named.insert(0, ("base", job.base))
    shape = tuple(named[0][1].shape)
    for what, array in named:
        if tuple(array.shape) != shape:
            raise InputError(
                f"shape of {what} for {_label(job)}: expected {shape} as in {named[0][0]}, "
                f"got {tuple(array.shape)}. All models must have the same architecture."
            )
        if dtype_word(array) not in _FLOATS:
            raise InputError(
                f"dtype of {what} for {_label(job)}: expected float64, float32, float16 or "
                "bfloat16, "
                f"got {array.dtype}. Integer tensors are not merged; they must agree and are "
                "copied."
            )
    if job.out is not None:
        if tuple(job.out.shape) != shape:
            raise InputError(
                f"out for {_label(job)}: expected shape {shape}, got {tuple(job.out.shape)}."
            )
        if dtype_word(job.out) not in _FLOATS:
            raise InputError(
                f"out for {_label(job)}: expected a floating dtype, got {job.out.dtype}."
            )
        first, last = extent_of(job.out)
        for what, array in named:
            a, b = extent_of(array)
            if a < last and first < b:
                raise InputError(
                    f"out for {_label(job)}: expected memory of its own, got memory that "
                    f"overlaps {what}. "
                    "Inputs are never written to."
                )
    _check_devices(job, named)
    if recipe.trim.rule is TrimRule.GIVEN and job.masks is None:
        raise InputError(
            f"masks for {_label(job)}: expected one per expert for the trim 'given', got none."
        )
    _check_masks(job, job.masks, "keep mask", allow_none=True)
    if recipe.consensus is not None and recipe.consensus.given and job.task_masks is None:
        raise InputError(f"task masks for {_label(job)}: expected one per expert, got none.")
    _check_masks(job, job.task_masks, "task mask", allow_none=False)


def _check_devices(job: Job, named: Sequence[tuple[str, Any]]) -> None:
    where = [(what, getattr(a, "device", "cpu")) for what, a in named]
    if job.out is not None:
        where.append(("out", getattr(job.out, "device", "cpu")))
    other, first = where[0]
    for what, device in where:
        if device != first and str(device) != str(first):  # words of devices are slow to make
            raise InputError(
                f"device of {what} for {_label(job)}: expected {first} as of {other}, got {device}."
            )

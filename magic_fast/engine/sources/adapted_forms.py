"""Tensors under an adapter that is no plain s·B·A (`magic_fast.adapters.forms`): made whole, as a
norm of a row or a Kronecker product has no blocks that come cheap."""

from __future__ import annotations

from math import prod
from typing import Any

from magic_fast.adapters import Adapter, AdapterModule
from magic_fast.checkpoint import Checkpoint, TensorInfo
from magic_fast.engine.plan.step import FLOATS
from magic_fast.engine.plan.units import element_size
from magic_fast.engine.sources.adapted_rows import Change, Source, numbers, widen
from magic_fast.errors import CheckpointError


def formed_change(
    module: AdapterModule, stored: TensorInfo, own: Checkpoint, adapter: Adapter
) -> Change:
    """How a stored tensor changes by a form.

    Raises:
        CheckpointError: of another dtype or shape than the tensor.
    """
    form, quantised = module.form, own.quantisation
    assert form is not None
    for info in (stored, *form.parts.values()):
        coded = info is stored and quantised is not None and stored.name in quantised.codes
        if info.dtype not in FLOATS or coded:
            got = f"{quantised.scheme} codes" if coded and quantised is not None else info.dtype
            raise CheckpointError(
                f"dtype of '{info.name}' in {info.path}: expected {', '.join(FLOATS)}, got {got}. "
                "Name files whose weights are not quantised."
            )
    plain = prod(form.shape) == prod(stored.shape) and (
        form.shape[:1] == stored.shape[:1] or prod(form.shape) == max(form.shape, default=1)
    )
    turned = len(form.shape) == 2 and form.shape[::-1] == stored.shape and not form.embedding
    turned = turned and not (plain and "diff" in form.parts)
    if not (plain or turned):
        raise CheckpointError(
            f"module '{module.name}' in {adapter.path}: expected a change of {list(stored.shape)} "
            f"as in {own.path}, got {form.words} of {list(form.shape)}. Name the model that the "
            "adapter was trained on."
        )
    if plain and turned:  # square: by the class of the module, else by the configuration
        role = own.roles[stored.name]
        turned = role.units == (1,) if role.owner else bool(adapter.config.get("fan_in_fan_out"))
    return Change(stored, module, module.down, turned)


def formed_values(change: Change, dtype: str, source: Source) -> Any:
    """The changed tensor whole, an array of float32, or of float64 where ``dtype`` is F64."""
    weight = _weight(change, dtype, source)
    return weight + delta_of(change, dtype, source, weight)


def delta_of(change: Change, dtype: str, source: Source, weight: Any = None) -> Any:
    """What a form adds to the stored tensor, in its layout."""
    import numpy as np

    form = change.module.form
    assert form is not None
    weight = _weight(change, dtype, source) if weight is None else weight
    own = weight.T if change.transposed else weight

    def get(info: TensorInfo) -> Any:
        return numbers(info, dtype, source).reshape(info.shape)

    delta = form.change(get, own)
    return np.ascontiguousarray(delta.T if change.transposed else delta)


def _weight(change: Change, dtype: str, source: Source) -> Any:
    import numpy as np

    stored = change.stored
    data = bytearray(prod(stored.shape) * element_size(stored.dtype))
    source.read_base(change, 0, memoryview(data))
    made = np.empty(stored.shape, "<f8" if dtype == "F64" else "<f4")
    widen(data, stored.dtype, made)
    return made

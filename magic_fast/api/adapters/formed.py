"""One module of K adapters of which some are no plain s·B·A: their changes formed whole, and the
result as factors of a rank; vectors stay the differences that they are."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from magic_fast.adapters import AdapterModule
from magic_fast.adapters.factors import LowRank, balanced, lost
from magic_fast.adapters.names import PEFT_PREFIX
from magic_fast.api.adapters.inputs import Asked, dtype_of, read, stored, weight_shape
from magic_fast.api.adapters.modules import Found, calibrated_change, low_rank, pair
from magic_fast.api.results import MergedModule
from magic_fast.api.tensors.merge import merge_task_vectors
from magic_fast.checkpoint import TensorInfo
from magic_fast.engine.sources.adapted_forms import delta_of
from magic_fast.errors import CheckpointError, InputError
from magic_fast.spectral import leading


def merge_formed(asked: Asked, name: str, own: Mapping[int, AdapterModule]) -> Found:
    """The tensors of one module of the result by their keys, and what became of it."""
    first = next(m for m in own.values() if m.form is not None)
    assert first.form is not None
    shape = weight_shape(first)
    taus: dict[int, Tensor] = {}
    given = []
    for k, module in own.items():
        taus[k], tensors = _change(asked, k, module)
        given += tensors
        if first.form.is_flat:  # the base, or another's factors, say what is a convolution
            shape = max(shape, tuple(taus[k].shape), key=len)
    dtype = max((t.dtype for t in taus.values()), key=lambda t: t.itemsize)
    none = torch.zeros(shape, dtype=dtype)
    every = [taus[k].to(dtype).reshape(shape) if k in taus else none
             for k in range(len(asked.adapters))]  # fmt: skip
    vector = len(shape) == 1 or first.leaf != "weight"
    key = first.down.name if vector else f"{name}.weight"
    merged = merge_task_vectors(
        [{key: tau} for tau in every], **asked.arguments(key, range(len(every)))
    )[key]
    ranks = tuple(m.rank for m in own.values())
    if vector:
        result = stored(asked, name, given, merged)
        return {key: result}, MergedModule(name, tuple(own), ranks, 0)
    if asked.rank is None:
        raise InputError(
            f"rank for '{name}' in {asked.adapters[next(iter(own))].path}: expected one, as it is "
            f"{first.form.words}, which another adapter holds at a rank only, got none. Pass a "
            "rank (--rank); the report says what it leaves out."
        )
    whole = merged.flatten(1)
    made = balanced(*leading(whole, min(asked.rank, *whole.shape), label=key))
    share = lost(whole - made.dense(), whole)
    embedding = first.embedding
    if asked.calibration is not None:
        eye = torch.eye(whole.shape[1], dtype=dtype)
        changes = [LowRank(tau.flatten(1), eye) for tau in every]
        if embedding:
            changes, made = [change.turned for change in changes], made.turned
        made, report = calibrated_change(asked, first, shape, changes, made)
        made = made.turned if embedding else made
    else:
        report = None
    made = made.turned if embedding else made
    down = made.down.reshape(made.rank, *([-1] if embedding else shape[1:]))
    up = made.up.reshape(-1, made.rank, *[1] * (down.dim() - 2))
    keys = _keys(asked, name, embedding)
    found = {k: stored(asked, name, given, x) for k, x in zip(keys, (down, up), strict=True)}
    return found, MergedModule(name, tuple(own), ranks, made.rank, share, report)


def _change(asked: Asked, k: int, module: AdapterModule) -> tuple[Tensor, list[Tensor]]:
    """τ in the layout [out, in, …] (embeddings as they are stored), and its tensors."""
    form, adapter = module.form, asked.adapters[k]
    if form is None:
        a, b = pair(asked, k, module)
        product = low_rank(a, b, module)
        product = product.turned if module.embedding else product
        return product.dense().reshape(weight_shape(module)), [a, b]
    tensors = {info.name: read(adapter, info) for info in form.parts.values()}
    wide = dtype_of(asked, list(tensors.values())) == torch.float64
    if asked.bases is not None:
        changed = asked.bases[k]
        change = next(c for c in changed.changed.values() if c.module is module)
        made = delta_of(change, "F64" if wide else "F32", changed)
        return torch.from_numpy(made.T.copy() if change.transposed else made), [*tensors.values()]
    if form.is_dora:
        raise InputError(
            f"base for '{module.name}' in {adapter.path}: expected one, as it is {form.words}, "
            "whose change is of the base's weight, got none. Pass base=MODEL (--base), the model "
            "that the adapter was trained on, and a rank; or merge full models, MODEL+ADAPTER."
        )

    def get(info: TensorInfo) -> Any:
        return tensors[info.name].to(torch.float64 if wide else torch.float32).numpy()

    return torch.from_numpy(form.change(get)), [*tensors.values()]


def _keys(asked: Asked, name: str, embedding: bool) -> tuple[str, str]:
    """Of A and B, as the first adapter's file calls such."""
    first = asked.adapters[0]
    if first.style == "peft":
        kind = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        stem = f"{PEFT_PREFIX}{name}.lora_"
        return stem + kind[0], stem + kind[1]
    kohya = any(key.endswith(".lora_down.weight") for key in first.checkpoint.tensors)
    names = ("down", "up") if kohya or first.style == "kohya" else ("A", "B")
    return f"{name}.lora_{names[0]}.weight", f"{name}.lora_{names[1]}.weight"


def is_formed(own: Mapping[int, AdapterModule]) -> bool:
    return any(module.form is not None for module in own.values())


def flat_modules(asked: Asked) -> list[str]:
    """Modules that are written as matrices, though nothing says that they are no convolutions."""
    if asked.bases is not None:
        return []
    return sorted(
        {n for a in asked.adapters for n, m in a.modules.items() if m.form and m.form.is_flat}
    )


def refuse_other_sizes(asked: Asked, name: str, own: Mapping[int, AdapterModule]) -> None:
    """Refuses changes of unlike tensors; a convolution may be flat in one of them."""
    first = next(iter(own))
    sizes = {k: (m.embedding, m.leaf, prod(weight_shape(m))) for k, m in own.items()}
    for k, module in own.items():
        if sizes[k] != sizes[first]:
            raise CheckpointError(
                f"module '{name}' in {asked.adapters[k].path}: expected a change of "
                f"{list(weight_shape(own[first]))} as in {asked.adapters[first].path}, got "
                f"{list(weight_shape(module))}. Merge adapters of one base model."
            )

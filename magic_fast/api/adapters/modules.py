"""One module of K adapters merged: LoRA by factors or by products, IA3 by vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from magic_fast.adapters import AdapterModule
from magic_fast.adapters.factors import (
    LowRank,
    balanced,
    calibrated,
    combined,
    evened,
    lost,
    no_change,
    truncated,
)
from magic_fast.adapters.merged import is_forward
from magic_fast.api.adapters.inputs import (
    Asked,
    dtype_of,
    read,
    refuse_other_shapes,
    stored,
    weight_shape,
)
from magic_fast.api.results import MergedModule, TensorCalibration
from magic_fast.api.tensors.calibrate_weights import calibrate_weights
from magic_fast.api.tensors.merge import merge, merge_task_vectors
from magic_fast.calibration import WeightCalibration
from magic_fast.errors import InputError
from magic_fast.methods.registry import find_method
from magic_fast.recipe import Granularity, Variant
from magic_fast.reference.calibration import magnitude_of, norms2
from magic_fast.spectral import leading

Found = tuple[dict[str, Tensor], MergedModule]


def merge_module(asked: Asked, name: str) -> Found:
    """The tensors of one module of the result by their keys, and what became of it."""
    own = {k: a.modules[name] for k, a in enumerate(asked.adapters) if name in a.modules}
    refuse_other_shapes(asked, own)
    if next(iter(own.values())).up is None:
        return _vectors(asked, name, own)
    if asked.on == "factors":
        return _factors(asked, name, own)
    return _products(asked, name, own)


def _vectors(asked: Asked, name: str, own: Mapping[int, AdapterModule]) -> Found:
    """IA3: methods see l − 1, and l itself under preset ``peft``."""
    key = next(iter(own.values())).down.name
    given = {k: read(asked.adapters[k], m.down) for k, m in own.items()}
    like = next(iter(given.values()))
    wide = {k: _widened(x) for k, x in given.items()}
    one = torch.ones(like.shape, dtype=_widened(*given.values()).dtype)
    report = None
    if asked.options["preset"] == "peft":
        merged = merge_task_vectors(
            [{key: x} for x in wide.values()], **asked.arguments(key, list(own))
        )[key]
    else:
        every = range(len(asked.adapters))
        vectors = [wide.get(k, one).to(one.dtype) for k in every]
        whole = find_method(asked.options["method"]).base == "none"
        merged = merge(
            None if whole else {key: one},
            [{key: x} for x in vectors],
            **asked.arguments(key, every),
        )[key]
        forward = {is_forward(asked.adapters[k], name) for k in own}
        if len(forward) > 1:
            raise InputError(
                f"module '{name}': expected all adapters to scale its inputs (feedforward_modules)"
                ", or none, got both. Merge adapters of one configuration."
            )
        if asked.calibration is not None and forward == {False} and like.dim() == 2:
            # each entry scales one row of the weight, whose length cancels
            merged, found = calibrate_weights(
                one, vectors, merged, calibration=asked.calibration, weights=list(asked.counting),
                backend=asked.options["backend"], name=f"{name}.weight",
            )  # fmt: skip
            report = found.tensors[0]
    result = stored(asked, name, list(given.values()), merged)
    return {key: result}, MergedModule(name, tuple(own), (), 0, 0.0, report)


def refuse_calibration_of_vectors(calibration: WeightCalibration) -> None:
    """Refuses what needs the lengths of rows, as functions of others may: an IA3 adapter has the
    factors of them only."""
    if not isinstance(calibration.variant, Variant):
        raise InputError(
            "calibrate for IA3: expected a variant whose ξ no scaling of a row changes, got "
            f"'{calibration.variant}', of which that is not known. Choose 'manifold' or 'sphere'."
        )
    if calibration.granularity is Granularity.TENSOR or calibration.variant is Variant.SPECTRAL:
        raise InputError(
            "calibrate for IA3: expected a variant by rows, got one by tensors, which needs the "
            "weights that the vectors scale. Choose granularity 'row' and another variant than "
            "'spectral'."
        )


def _factors(asked: Asked, name: str, own: Mapping[int, AdapterModule]) -> Found:
    """A and B each by themselves: A weighted by sign(w·s)·√|w·s|, B by √|w·s| (PEFT)."""
    first = next(iter(own.values()))
    assert first.up is not None
    for k, module in own.items():
        if module.rank != first.rank:
            raise InputError(
                f"rank of '{name}' in {asked.adapters[k].path}: expected {first.rank} as of the "
                f"other adapters, got {module.rank}. Choose on='weights', where ranks may differ."
            )
    products = [asked.counting[k] * m.scaling for k, m in own.items()]
    roots = [math.sqrt(abs(x)) for x in products]
    signed = [-r if x < 0 else r for r, x in zip(roots, products, strict=True)]
    found: dict[str, Tensor] = {}
    for key, infos, weights in (
        (first.down.name, {k: m.down for k, m in own.items()}, signed),
        (first.up.name, {k: m.up for k, m in own.items()}, roots),
    ):
        given = [read(asked.adapters[k], info) for k, info in infos.items() if info is not None]
        merged = merge_task_vectors(
            [{key: _widened(x)} for x in given],
            **asked.arguments(key, list(own)) | {"weights": weights},
        )[key]
        found[key] = stored(asked, name, given, merged)
    ranks = tuple(m.rank for m in own.values())
    return found, MergedModule(name, tuple(own), ranks, first.rank)


def _products(asked: Asked, name: str, own: Mapping[int, AdapterModule]) -> Found:
    """The changes s·B·A themselves, and the result as factors again."""
    first = next(iter(own.values()))
    assert first.up is not None
    given = {k: pair(asked, k, m) for k, m in own.items()}
    have = {k: low_rank(*given[k], m) for k, m in own.items()}
    none = no_change(next(iter(have.values())))
    changes = [have.get(k, none) for k in range(len(asked.adapters))]
    merged = _sum if asked.coefficients is not None else _by_method
    made, share = merged(asked, first, changes)
    made, report = calibrated_change(asked, first, weight_shape(first), changes, made)
    every = [x for pair in given.values() for x in pair]
    if dtype_of(asked, every) == torch.float16:
        made = evened(made)
    down = made.down.reshape(made.rank, *first.down.shape[1:])
    up = made.up.reshape(first.up.shape[0], made.rank, *first.up.shape[2:])
    found = {
        first.down.name: stored(asked, name, every, down),
        first.up.name: stored(asked, name, every, up),
    }
    ranks = tuple(m.rank for m in own.values())
    return found, MergedModule(name, tuple(own), ranks, made.rank, share, report)


def pair(asked: Asked, k: int, module: AdapterModule) -> tuple[Tensor, Tensor]:
    """(A, B) as they are stored."""
    assert module.up is not None
    return read(asked.adapters[k], module.down), read(asked.adapters[k], module.up)


def low_rank(down: Tensor, up: Tensor, module: AdapterModule) -> LowRank:
    """s·B·A in at least float32; an embedding changes by its transpose."""
    dtype = _widened(down, up).dtype
    return LowRank(up.to(dtype).flatten(1), down.to(dtype).flatten(1) * module.scaling)


def _widened(first: Tensor, *others: Tensor) -> Tensor:
    """In what all of them promote to, at least float32."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return first.to(dtype)


def _sum(asked: Asked, module: AdapterModule, changes: Sequence[LowRank]) -> tuple[LowRank, float]:
    """By the factors alone: nothing of the size of the weight is formed."""
    assert asked.coefficients is not None
    counting = [(x, c) for x, c in zip(changes, asked.coefficients, strict=True) if c]
    chosen = counting or [(x, 0.0) for x in changes]
    exact = combined([x for x, _ in chosen], [c for _, c in chosen])
    if asked.rank is None or asked.rank >= exact.rank:
        return exact, 0.0
    rank = min(asked.rank, exact.up.shape[0], exact.down.shape[1])
    return truncated(exact, rank, f"{module.name}.weight")


def _by_method(
    asked: Asked, module: AdapterModule, changes: Sequence[LowRank]
) -> tuple[LowRank, float]:
    """By any method, on the changes of this one module formed whole."""
    weight, shape = f"{module.name}.weight", weight_shape(module)
    dense = [(c.turned if module.embedding else c).dense().reshape(shape) for c in changes]
    taus = [{weight: tau} for tau in dense]
    merged = merge_task_vectors(taus, **asked.arguments(weight, range(len(taus))))
    whole = merged[weight].flatten(1)
    rank = min(asked.rank or max(change.rank for change in changes), *whole.shape)
    made = balanced(*leading(whole, rank, label=weight))
    share = lost(whole - made.dense(), whole)
    return made.turned if module.embedding else made, share


def calibrated_change(
    asked: Asked,
    module: AdapterModule,
    shape: tuple[int, ...],
    changes: Sequence[LowRank],
    made: LowRank,
) -> tuple[LowRank, TensorCalibration | None]:
    """Of what the result holds at its rank, so that its rows have the magnitudes in the end."""
    if asked.calibration is None:
        return made, None
    weight = f"{module.name}.weight"
    settings = asked.calibration  # changes are [out, in], whatever their weight is
    axes = 0 if settings.row_axis is None else settings.row_axis
    calibration = settings.resolve(weight, shape, asked.counting, row_axis=axes)
    if calibration is None:
        return made, TensorCalibration(weight, shape, False)
    by_column = calibration.axes == (1,) and len(shape) == 2
    if calibration.axes != (0,) and not by_column:
        raise InputError(
            f"row_axis for {weight}: expected 0, or 1 of a matrix, got {calibration.axes}."
        )
    turned = by_column != module.embedding
    if turned:
        changes, made = [change.turned for change in changes], made.turned
    made, rows = calibrated(changes, made, calibration, weight)
    report = TensorCalibration(
        weight, shape, True, rows.raw.float(), int(rows.repaired.sum()),
        **magnitude_of(norms2(rows)),
    )  # fmt: skip
    return made.turned if turned else made, report

"""What a merge of adapters was asked for, and the tensors it reads and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from magic_fast.adapters import Adapter, AdapterModule
from magic_fast.api.tensors.merge import merge_task_vectors
from magic_fast.calibration import WeightCalibration
from magic_fast.checkpoint import TensorInfo
from magic_fast.engine.execute.whole import DTYPES
from magic_fast.engine.sources.adapted import AdaptedCheckpoint
from magic_fast.errors import CheckpointError, InputError, NonFiniteError
from magic_fast.recipe import Align, Contributors, Recipe, Reduce, Vote, Weigh

_SUMS = (Reduce.SUM, Reduce.MEAN, Reduce.WEIGHTED_MEAN)


@dataclass(frozen=True)
class Asked:
    """A merge of adapters, its arguments checked.

    Attributes:
        adapters: K opened ones of one kind.
        weights: K numbers; None where the method takes none.
        options: of :func:`merge_task_vectors`, but for weights, masks and calibration.
        masks: K mappings, or None.
        bases: the base model with each of the adapters on it, where it was named.
        coefficients: c with Δ = Σ c_k·τ_k; None where the method is not linear.
    """

    adapters: Sequence[Adapter]
    weights: tuple[float, ...] | None
    options: Mapping[str, Any]
    masks: Sequence[Mapping[str, Tensor]] | None
    calibration: WeightCalibration | None
    coefficients: tuple[float, ...] | None
    rank: int | None
    on: str
    dtype: torch.dtype | None
    bases: Sequence[AdaptedCheckpoint] | None = None

    def arguments(self, key: str, own: Sequence[int]) -> dict[str, Any]:
        """Of :func:`merge_task_vectors`, for one tensor of these adapters."""
        found = dict(self.options)
        if self.weights is not None:
            found["weights"] = [self.weights[k] for k in own]
        if self.masks is not None:
            masks = [self.masks[k] for k in own]
            found["masks"] = [{key: m[key]} if key in m else {} for m in masks]
        return found

    @property
    def counting(self) -> tuple[float, ...]:
        """K weights, 1 where the method takes none: which adapters count in a calibration."""
        return self.weights or (1.0,) * len(self.adapters)


def coefficients_of(
    recipe: Recipe | None, num_adapters: int, arguments: Mapping[str, Any]
) -> tuple[float, ...] | None:
    """c with Δ = Σ c_k·τ_k: what the method makes of K unit vectors, where it is linear."""
    linear = (
        recipe is not None
        and recipe.reduce in _SUMS
        and recipe.vote is Vote.NONE
        and recipe.contributors is Contributors.ALL
        and recipe.align is Align.NONE
        and recipe.weigh is Weigh.GIVEN
        and not recipe.trims
        and not recipe.signed_result
        and (recipe.consensus, recipe.alone, recipe.limit) == (None, None, None)
    )
    if not linear:
        return None
    units = torch.eye(num_adapters, dtype=torch.float64)
    found: list[float] = merge_task_vectors(units, **arguments).tolist()
    return tuple(found)


def weight_shape(module: AdapterModule) -> tuple[int, ...]:
    """Of what a module changes, [out, in] of a matrix whichever way its model stores it; an IA3
    vector's own."""
    if module.form is not None:
        return module.form.shape
    if module.up is None:
        return module.down.shape
    out, into = module.up.shape[0], module.down.shape[1:]
    return (*into, out) if module.embedding else (out, *into)


def refuse_other_shapes(asked: Asked, own: Mapping[int, AdapterModule]) -> None:
    first = next(iter(own))
    expected = weight_shape(own[first])
    for k, module in own.items():
        if weight_shape(module) != expected:
            raise InputError(
                f"module '{module.name}' in {asked.adapters[k].path}: expected the shape "
                f"{list(expected)} as in {asked.adapters[first].path}, got "
                f"{list(weight_shape(module))}. Merge adapters of one base model."
            )


def read(adapter: Adapter, info: TensorInfo) -> Tensor:
    """A stored tensor, refused where it is not finite."""
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"dtype of '{info.name}' in {adapter.path}: expected {', '.join(DTYPES)}, got "
            f"{info.dtype}. Save the adapter in one of them."
        )
    data = adapter.checkpoint.read(info.name)
    x = torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)
    if not bool(x.isfinite().all()):
        raise NonFiniteError(
            f"tensor '{info.name}' in {adapter.path}: expected finite values, got NaN or infinity. "
            "Leave that adapter out."
        )
    return x


def refuse_unlike(opened: Sequence[Adapter], base_model: str | None) -> str | None:
    """Refuses adapters that are not of one kind, naming and base; that base, if one is named."""
    first = opened[0]
    for other in opened:
        if (other.kind, other.style) != (first.kind, first.style):
            raise CheckpointError(
                f"adapter {other.path}: expected {_words(first)} as {first.path} is, got "
                f"{_words(other)}. Merge adapters of one kind and naming."
            )
        _refuse_other_prefix(first, other)
    if base_model is not None and first.style == "diffusers":
        raise InputError(
            "base_model for diffusers' files: expected none, got one. They name no base: leave it "
            "out."
        )
    if base_model is not None:
        return base_model
    named = [a for a in opened if a.base_model]
    for other in named:
        if other.base_model != named[0].base_model:
            raise InputError(
                f"base model of {other.path}: expected {named[0].base_model!r} as of "
                f"{named[0].path}, got {other.base_model!r}. Adapters of different models do not "
                "add up; where the two are the same, name it by base_model."
            )
    return named[0].base_model if named else None


_DENOISERS = frozenset({"transformer", "unet", "diffusion_model"})  # the same part of a pipeline


def _refuse_other_prefix(first: Adapter, other: Adapter) -> None:
    """Refuses two names of one module: each would stay a module of its own."""
    parts = (name.partition(".") for name in first.modules)
    known = {inner: part for part, _, inner in parts if part in _DENOISERS}
    for name in other.modules:
        part, _, inner = name.partition(".")
        if part in _DENOISERS and known.get(inner, part) != part:
            raise CheckpointError(
                f"module '{name}' in {other.path}: expected it as '{known[inner]}.{inner}', as in "
                f"{first.path}, got names that begin with '{part}.'. One file cannot hold both: "
                "save the adapters by one library."
            )


def _words(adapter: Adapter) -> str:
    kinds = {"lora": "LoRA", "ia3": "IA3"}
    return f"{kinds[adapter.kind]} in {adapter.style}'s naming"


def base_copies(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Weights of the base, by their keys, that PEFT saves beside factors on embeddings and heads:
    the result has them too. Refuses what was trained whole."""
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, key in adapter.whole.items():
            if not key.endswith(".base_layer.weight"):  # biases there are trained
                raise CheckpointError(
                    f"tensor '{name}' in {adapter.path}: expected factors only, got a tensor of "
                    "the model that was trained whole. Merge full models: `magic-fast merge` takes "
                    f"MODEL+{adapter.path} for a model."
                )
            own = read(adapter, adapter.checkpoint.tensors[key])
            other = found.setdefault(key, own)
            if (own.dtype, own.shape) != (other.dtype, other.shape) or not own.equal(other):
                raise CheckpointError(
                    f"base weight '{key}' in {adapter.path}: expected that of the other adapters, "
                    "got another. Merge adapters of one base model; where its vocabulary was "
                    "resized, merge full models."
                )
    return found


def dtype_of(asked: Asked, tensors: Sequence[Tensor]) -> torch.dtype:
    """Of the result: what was asked for, else what all of these promote to."""
    return asked.dtype or reduce(torch.promote_types, (t.dtype for t in tensors))


def stored(asked: Asked, name: str, tensors: Sequence[Tensor], result: Tensor) -> Tensor:
    """The result as it is written."""
    dtype = dtype_of(asked, tensors)
    rounded = result.to(dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise NonFiniteError(
            f"module '{name}' of the result: expected values within {dtype}, got an overflow. "
            + ("Use smaller weights." if dtype == torch.float32 else "Pass dtype='float32'.")
        )
    return rounded

"""mergekit 0.1.5: methods are objects in ``registry._METHODS`` with a ``spec`` and a
``merge_group`` (or a batch kernel)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Annotated, Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    MISSING,
    BasePolicy,
    BatchedMergeMethod,
    FunctionalGroupMergeMethod,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorBatch,
    TensorGroup,
)
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from pydantic import AfterValidator, ValidationError
from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.integrations.mergekit import calls
from magic_fast.methods.spec import MethodSpec
from magic_fast.methods.spec import ParameterSpec as Described


class OurParameter(ParameterSpec):  # type: ignore[misc]
    """A parameter that mergekit does not know; a bad value is an error of ours, in words."""

    def validate(self, value: Any) -> Any:
        try:
            return super().validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            plain = f"{self.name}: {first['msg']}, got {value!r}. Correct it."
            raise InputError(str(first.get("ctx", {}).get("error", plain))) from None


_CALIBRATE = OurParameter(
    "calibrate",
    Annotated[Any, AfterValidator(calls.calibration_of)],
    ParameterScope.SHARED,
    default=None,
    description="wsc, or settings of the calibration in quotes",
)
_TYPES: dict[str, Any] = {"float": float, "int": int, "bool": bool, "rescale": bool | str}


def _listed(group: TensorGroup, parameters: dict[str, Any]) -> dict[str, Any]:
    """Values per input as lists in the order of the group."""
    return {
        name: [value[e.id] for e in group.entries if e.id in value] if hasattr(value, "values_for")
        else value
        for name, value in parameters.items()
    }  # fmt: skip


def _merged(method: str, group: TensorGroup, calibrate: Any, arguments: dict[str, Any]) -> Tensor:
    """Base and experts of a group through our merge."""
    base, experts, name = group.base, group.non_base, group.metadata.name
    axis = None
    if calibrate is not None:
        shape = tuple(experts[0].tensor.shape)
        axis = calls.row_axis_of([e.id for e in experts], name, shape, calibrate)
    return calls.run(
        method,
        None if base is None else base.tensor,
        [entry.tensor for entry in experts],
        arguments,
        name=name,
        calibrate=calibrate,
        row_axis=axis,
    )


class FastTaskArithmetic(GeneralizedTaskArithmeticMerge):  # type: ignore[misc]
    """One of mergekit's methods on task vectors, in one pass; with ``calibrate`` besides."""

    @cached_property
    def spec(self) -> MergeMethodSpec:
        own = super().spec
        return replace(own, parameters=(*own.parameters, _CALIBRATE))

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        calibrate = parameters.pop("calibrate", None)
        arguments = calls.arguments_of(self.method_name, _listed(group, parameters))
        leave = arguments is None or not calls.takes(group.tensors)
        if not group.non_base or (leave and calibrate is None):
            theirs: Tensor = super().merge_group(group, **parameters)
            return theirs
        if arguments is None:
            raise calls.out_of_range(self.method_name, group.metadata.name)
        return _merged(self.method_name, group, calibrate, arguments)


class NewMethod(GroupMergeMethod):  # type: ignore[misc]
    """A method of ours that mergekit lacks."""

    def __init__(self, ours: MethodSpec) -> None:
        own = [p for p in ours.parameters if p.name != "scope"]  # of pcb: one tensor at a time
        self.spec = MergeMethodSpec(
            name=ours.name,
            pretty_name=ours.paper.title,
            reference_url=f"https://arxiv.org/abs/{ours.paper.arxiv}" if ours.paper.arxiv else None,
            parameters=(*map(_parameter, own), _CALIBRATE),
            contract=InputContract(
                base=BasePolicy.REQUIRED,
                min_non_base=ours.min_experts,
                max_non_base=ours.max_experts,
            ),
        )
        self._fixed = {"scope": "tensor"} if ours.find("scope") else {}

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        calibrate, name = parameters.pop("calibrate", None), self.spec.name
        arguments = calls.arguments_of(name, _listed(group, parameters))
        if arguments is None:
            raise calls.out_of_range(name, group.metadata.name)
        return _merged(name, group, calibrate, arguments | self._fixed)


def _parameter(ours: Described) -> ParameterSpec:
    """A parameter of ours as mergekit declares one; a bad value is refused while it plans."""

    def check(value: Any) -> Any:
        if value is not None:
            try:
                calls.check_value(ours, value)
            except InputError as error:
                raise ValueError(str(error)) from None
        return value

    kind = _TYPES.get(ours.kind, str)
    default = ours.default_for(calls.PRESET)
    if default is None:
        default = MISSING if ours.required else None
    value_type = kind if default is not None else kind | None
    scope = ParameterScope.NON_BASE if ours.scope == "per_model" else ParameterScope.SHARED
    return OurParameter(
        ours.name, Annotated[value_type, AfterValidator(check)], scope, default=default
    )


def _linear(original: Any) -> Any:
    """The weighted mean over a batch of outputs, one fused pass each."""
    theirs = original.implementation

    def linear(batch: TensorBatch, weight: Tensor, normalize: bool = True) -> Tensor:
        weights = weight.tolist()
        given = [
            calls.arguments_of("linear", {"weight": row, "normalize": normalize})
            for row in weights
        ]  # fmt: skip
        if None in given or not calls.takes(batch.tensors):
            result: Tensor = theirs(batch, weight=weight, normalize=normalize)
            return result
        out = torch.empty_like(batch.tensors[0], memory_format=torch.contiguous_format)
        for index, arguments in enumerate(given):
            experts = [tensor[index] for tensor in batch.tensors]
            calls.run("linear", None, experts, arguments or {}, name=None, out=out[index])
        return out

    return BatchedMergeMethod(original.spec, linear)


def _karcher(original: Any) -> Any:
    """The mean on the sphere: iterations over inner products, two reads of the tensors."""
    theirs = original.implementation

    def karcher(group: TensorGroup, **parameters: Any) -> Tensor:
        arguments = calls.arguments_of("karcher", parameters)
        if arguments is None or len(group.entries) < 2 or not calls.takes(group.tensors):
            result: Tensor = theirs(group, **parameters)
            return result
        return calls.run("karcher", None, group.tensors, arguments, name=group.metadata.name)

    return FunctionalGroupMergeMethod(original.spec, karcher)


def _replacement(original: Any) -> Any | None:
    """The fast twin of a registered method; None where it is not the one that is known here."""
    name = original.spec.name
    if isinstance(original, GeneralizedTaskArithmeticMerge):
        return FastTaskArithmetic(**{f.name: getattr(original, f.name) for f in fields(original)})
    if name == "linear" and isinstance(original, BatchedMergeMethod):
        return _linear(original)
    if name == "karcher" and isinstance(original, FunctionalGroupMergeMethod):
        return _karcher(original)
    return None


def replace_methods(names: Sequence[str]) -> calls.Replaced:
    """Puts the fast methods into mergekit's registry, the new ones beside them."""
    return calls.replace_in(registry._METHODS, names, _replacement, NewMethod)

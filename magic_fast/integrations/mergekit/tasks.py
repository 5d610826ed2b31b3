"""mergekit 0.1.4: methods are objects in ``registry.REGISTERED_MERGE_METHODS`` whose ``make_task``
gives a task of its graph. Its parameters are numbers, also where a word is meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ConfigParameterDef, MergeMethod
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.karcher import KarcherMerge
from mergekit.merge_methods.linear import LinearMerge
from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.integrations.mergekit import calls
from magic_fast.methods.registry import find_method
from magic_fast.methods.spec import MethodSpec, ParameterSpec

_CALIBRATE = ConfigParameterDef(name="calibrate", required=False, default_value=None)
_KINDS = {"bool": bool, "int": int, "rescale": bool}  # what a number stands for
_NUMBERS = ("float", *_KINDS)


def _value(ours: ParameterSpec | None, value: Any) -> Any:
    """A number of mergekit's as the kind that is declared here; others as they are."""
    kind = _KINDS.get(ours.kind) if ours is not None else None
    return kind(value) if kind and isinstance(value, float) and kind(value) == value else value


def _values(method: str, given: ImmutableMap) -> dict[str, Any]:
    spec = find_method(method)
    return {k: _value(spec.find(k), v) for k, v in given.items() if k != "calibrate"}


def _compat(method: str) -> str | None:
    """This release's Breadcrumbs zeroes a tensor that is too small for an outlier; so does ours."""
    return "mergekit-0.1.4" if method.startswith("breadcrumbs") else None


class FastTask(Task):  # type: ignore[misc]
    """One tensor by our merge; by mergekit's own task where that is left to it."""

    method: str
    name: str
    inputs: Task
    theirs: Task | None
    base_model: ModelReference | None
    parameters: ImmutableMap
    tensor_parameters: ImmutableMap
    calibrate: Any

    def arguments(self) -> dict[str, Task]:
        return {"tensors": self.inputs}

    def group_label(self) -> str | None:
        label: str | None = self.inputs.group_label()
        return label

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, tensors: dict[ModelReference, Tensor], **_: Any) -> Tensor:
        base = tensors.get(self.base_model)
        experts = {m: t for m, t in tensors.items() if m != self.base_model}
        if not experts and base is not None and self.theirs is None:
            return base
        arguments = calls.arguments_of(self.method, self._listed(list(experts)))
        usable = arguments is not None and calls.takes(list(tensors.values()))
        alike = len({t.shape for t in tensors.values()}) == 1 and (
            base is not None or self.base_model is None
        )
        fewest = 2 if self.method == "karcher" else 1
        if (
            self.theirs is not None
            and self.calibrate is None
            and not (usable and alike and len(experts) >= fewest)
        ):
            result: Tensor = self.theirs.execute(tensors=tensors)
            return result
        if arguments is None:
            raise calls.out_of_range(self.method, self.name)
        axis = None
        if self.calibrate is not None:
            shape = tuple(next(iter(experts.values())).shape)
            axis = calls.row_axis_of(list(experts), self.name, shape, self.calibrate)
        return calls.run(
            self.method, base, list(experts.values()), arguments, name=self.name,
            calibrate=self.calibrate, row_axis=axis, compat=_compat(self.method),
        )  # fmt: skip

    def _listed(self, models: Sequence[ModelReference]) -> dict[str, Any]:
        """Values per input as lists in the order of the experts, beside those of the tensor."""
        each = [_values(self.method, self.tensor_parameters[m]) for m in models]
        names = each[0] if each else ()
        return {n: [v[n] for v in each] for n in names} | _values(self.method, self.parameters)


class FastMethod(MergeMethod):  # type: ignore[misc]
    """One of mergekit's methods; on task vectors with ``calibrate`` besides."""

    def __init__(self, original: MergeMethod) -> None:
        self._original = original
        self._on_base = isinstance(original, GeneralizedTaskArithmeticMerge)

    def name(self) -> str:
        return self._original.name()  # type: ignore[no-any-return]

    def pretty_name(self) -> str | None:
        return self._original.pretty_name()  # type: ignore[no-any-return]

    def reference_url(self) -> str | None:
        return self._original.reference_url()  # type: ignore[no-any-return]

    def parameters(self) -> list[ConfigParameterDef]:
        return [*self._original.parameters(), *([_CALIBRATE] if self._on_base else [])]

    def tensor_parameters(self) -> list[ConfigParameterDef]:
        return self._original.tensor_parameters()  # type: ignore[no-any-return]

    def make_task(
        self, *, output_weight: Any, tensors: Any, parameters: Any, tensor_parameters: Any,
        base_model: ModelReference | None = None,
    ) -> FastTask:  # fmt: skip
        theirs = self._original.make_task(
            output_weight=output_weight, tensors=tensors, parameters=parameters,
            tensor_parameters=tensor_parameters, base_model=base_model,
        )  # fmt: skip
        return FastTask(
            method=self.name(),
            name=output_weight.name,
            inputs=tensors,
            theirs=theirs,
            base_model=base_model if self._on_base else None,
            parameters=ImmutableMap(dict(parameters.items())),
            tensor_parameters=tensor_parameters,
            calibrate=calls.calibration_of(dict(parameters.items()).get("calibrate")),
        )


class NewMethod(MergeMethod):  # type: ignore[misc]
    """A method of ours that mergekit lacks; of its parameters those that are numbers."""

    def __init__(self, ours: MethodSpec) -> None:
        self._spec = ours
        self._fixed = {"scope": "tensor"} if ours.find("scope") else {}

    def name(self) -> str:
        return self._spec.name

    def pretty_name(self) -> str | None:
        return self._spec.paper.title

    def reference_url(self) -> str | None:
        number = self._spec.paper.arxiv
        return f"https://arxiv.org/abs/{number}" if number else None

    def _declared(self, per_model: bool) -> list[ConfigParameterDef]:
        return [
            ConfigParameterDef(
                name=p.name,
                required=p.required and p.default_for(calls.PRESET) is None,
                default_value=p.default_for(calls.PRESET),
            )
            for p in self._spec.parameters
            if p.kind in _NUMBERS and (p.scope == "per_model") == per_model
        ]

    def parameters(self) -> list[ConfigParameterDef]:
        return [*self._declared(False), _CALIBRATE]

    def tensor_parameters(self) -> list[ConfigParameterDef]:
        return self._declared(True)

    def make_task(
        self, *, output_weight: Any, tensors: Any, parameters: Any, tensor_parameters: Any,
        base_model: ModelReference | None = None,
    ) -> FastTask:  # fmt: skip
        if base_model is None:
            raise InputError(
                f"base_model of method {self.name()!r}: expected one, got none. Add it to the YAML."
            )
        for name, value in parameters.items():
            found = self._spec.find(name)
            if found is not None and value is not None:
                calls.check_value(found, _value(found, value))
        return FastTask(
            method=self.name(),
            name=output_weight.name,
            inputs=tensors,
            theirs=None,
            base_model=base_model,
            parameters=ImmutableMap(dict(parameters.items()) | self._fixed),
            tensor_parameters=tensor_parameters,
            calibrate=calls.calibration_of(dict(parameters.items()).get("calibrate")),
        )


def _replacement(original: Any) -> FastMethod | None:
    """The fast twin of a registered method; None where it is not the one that is known here."""
    known = (GeneralizedTaskArithmeticMerge, LinearMerge, KarcherMerge)
    return FastMethod(original) if isinstance(original, known) else None


def replace_methods(names: Sequence[str]) -> calls.Replaced:
    """Puts the fast methods into mergekit's registry, the new ones beside them."""
    return calls.replace_in(registry.REGISTERED_MERGE_METHODS, names, _replacement, NewMethod)

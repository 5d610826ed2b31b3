"""What a layout is made of: views of the inputs, and the tensors of the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from magic_fast.methods.arguments import python_name
from magic_fast.methods.registry import find_method
from magic_fast.methods.spec import Value


class ModelView(Protocol):
    """What the layout needs to know of a checkpoint."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Parsed ``config.json``, or an empty mapping."""

    def names(self) -> Iterable[str]:
        """Names of all stored tensors, in a fixed order."""

    def has(self, name: str) -> bool:
        """Whether ``name`` is stored, or is tied to a tensor that is."""

    def counted_stack(self) -> str | None:
        """What stands before a layer's number in the names of the layers that the configuration
        counts, or None where that is not known."""

    def is_derived(self, name: str) -> bool:
        """Whether a stored tensor is a buffer that follows from the configuration."""

    def left_out(self) -> frozenset[str]:
        """The stored tensors that the merge leaves out."""

    def is_loaded(self, name: str) -> bool:
        """Whether a stored tensor is not left aside when the model is loaded."""


@dataclass(frozen=True, slots=True)
class Source:
    """One input tensor: ``model`` is the reference as the configuration has it."""

    model: str
    tensor_name: str
    is_base: bool = False


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name: in the output.
        sources: what is merged, in the order of the configuration; an unlisted base comes last.
        base: what task vectors start from; None for a method on whole models. Where only the
            calibration needs a base it is here and not among ``sources``.
        parameters: value of each per-tensor parameter, by its YAML name.
        expert_parameters: for each per-model parameter one value per expert (sources that are not
            the base), by its YAML name. A parameter that is set nowhere and has no default is
            absent. Both mappings are shared between tensors: do not change them.
    """

    name: str
    sources: tuple[Source, ...]
    base: Source | None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    expert_parameters: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[Source, ...]:
        """The sources that are not the base."""
        return tuple(source for source in self.sources if not source.is_base)

    def arguments(self, merge_method: str) -> dict[str, Value | tuple[Value, ...]]:
        """All parameters under the names that ``mf.merge`` gives them (``lambda`` is ``scale``)."""
        named: dict[str, Value | tuple[Value, ...]] = {}
        for spec in find_method(merge_method).parameters:
            for values in (self.parameters, self.expert_parameters):
                if spec.name in values:
                    named[python_name(spec)] = values[spec.name]
        return named

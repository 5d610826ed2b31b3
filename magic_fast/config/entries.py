"""The parts of a merge description: models, slices, sources, the tokenizer block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from magic_fast.config.calibrate import Strict
from magic_fast.config.faults import UNSUPPORTED
from magic_fast.config.problems import listed
from magic_fast.config.tokens import Reference

Dtype = Literal["float32", "float16", "bfloat16", "float64"]
_DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "f32": "float32",
    "half": "float16",
    "fp16": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
    "double": "float64",
    "fp64": "float64",
    "f64": "float64",
}


def canonical_dtype(value: Any) -> Any:
    name = value.removeprefix("torch.").lower() if isinstance(value, str) else value
    name = _DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name
    if name is not None and name not in get_args(Dtype):
        raise ValueError(f"expected one of {listed(get_args(Dtype))}, got {value!r}")
    return name


Parameters = dict[str, Any]


class Node(Strict):
    """A mapping of mergekit's YAML: unsupported keys that are null are as good as absent."""

    @model_validator(mode="before")
    @classmethod
    def _drop_null_extras(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kept = {k: v for k, v in value.items() if not (k in UNSUPPORTED and v is None)}
        if "parameters" in kept and kept["parameters"] is None:
            kept.pop("parameters")
        return kept


class ModelEntry(Node):
    """One item of ``models:``."""

    model: Reference
    parameters: Parameters = Field(default_factory=dict)


class SourceEntry(Node):
    """One item of a slice's ``sources:``; ``layer_range`` is [first, end)."""

    model: Reference
    layer_range: tuple[Annotated[int, Field(strict=True)], Annotated[int, Field(strict=True)]]
    parameters: Parameters = Field(default_factory=dict)


class SliceEntry(Node):
    """One item of ``slices:``: layers of several models that are merged with one another.

    ``base_model`` goes before the top level's. ``residual_weight`` is mergekit's, which reads it
    and does nothing with it.
    """

    sources: tuple[SourceEntry, ...]
    base_model: Reference | None = None
    residual_weight: float | None = None
    parameters: Parameters = Field(default_factory=dict)


class ModuleEntry(Node):
    """One item of ``modules:``: how one part of the model is merged."""

    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[SliceEntry, ...] | None = None
    parameters: Parameters = Field(default_factory=dict)

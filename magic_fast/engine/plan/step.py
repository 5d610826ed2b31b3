"""One output tensor of a merge of checkpoints as data: where it comes from and what is done to it.
No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

from magic_fast.checkpoint import TensorInfo, TensorSpec
from magic_fast.errors import InputError
from magic_fast.recipe import Recipe, RowCalibration

FLOATS = ("F64", "F32", "F16", "BF16")
_T = TypeVar("_T")
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_MERGED = frozenset(FLOATS + _INTEGERS)
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Input:
    """One stored tensor: ``model`` as the user named it; ``shape`` may be cut to the leading
    rows."""

    model: str
    info: TensorInfo
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = _BYTES.get(self.info.dtype)
        if n is None or self.shape == self.info.shape:
            return self.info.nbytes
        for extent in self.shape:
            n *= extent
        return n


@dataclass(frozen=True)
class Step:
    """One output tensor.

    Attributes:
        name, shape, dtype: of the output.
        base: what task vectors start from, or None.
        experts: the other sources; for ``copy`` steps the first one is copied and all must agree.
        method, arguments, preset: of a method that is no recipe.
        recipe: of an element-wise method; None with ``method`` for the others, and for copies.
        whole: the recipe runs on whole weights; ``base`` is there for the calibration only.
        merged: a model merged elsewhere that this step calibrates.
        calibration: WSC, or None.
        cast: inputs are rounded to this dtype first, or None.
        copy: an integer tensor, or one that is not touched.
        exact: a copy of the bytes, whatever they hold.
        inputs: everything this step reads, base first, merged last.
        numel: elements of the output.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base: Input | None
    experts: tuple[Input, ...]
    recipe: Recipe | None = None
    method: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preset: str = "default"
    whole: bool = False
    merged: Input | None = None
    calibration: RowCalibration | None = None
    cast: str | None = None
    copy: bool = False
    exact: bool = False

    inputs: tuple[Input, ...] = field(init=False, repr=False, compare=False)
    numel: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first = () if self.base is None else (self.base,)
        last = () if self.merged is None else (self.merged,)
        object.__setattr__(self, "inputs", (*first, *self.experts, *last))
        object.__setattr__(self, "numel", prod(self.shape))

    def split(self, values: Sequence[_T]) -> tuple[_T | None, list[_T], _T | None]:
        """(Base, experts, a model merged elsewhere) of what ``inputs`` have in their order."""
        rows = list(values)
        merged = rows.pop() if self.merged is not None else None
        base = rows.pop(0) if self.base is not None else None
        return base, rows, merged

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


def over_model(step: Step) -> bool:
    """Whether a threshold over the whole model trims this step."""
    return step.recipe is not None and step.recipe.over_model


def common_shape(
    name: str, inputs: Sequence[Input], *, allow_truncation: bool = False
) -> tuple[tuple[int, ...], bool]:
    """The shape all inputs share, and whether it was cut to the fewest rows.

    Raises:
        InputError: shapes differ, or a dtype is not one that can be merged.
    """
    first = inputs[0]
    for other in () if {i.info.dtype for i in inputs} <= _MERGED else inputs:
        if other.info.dtype not in _MERGED:
            raise InputError(
                f"dtype of '{name}' in {other.model}: expected F64, F32, F16, BF16 or an "
                "integer type, got "
                f"{other.info.dtype}. Convert quantised checkpoints to one of these first."
            )
    shapes = {i.info.shape for i in inputs}
    if len(shapes) == 1:
        return first.info.shape, False
    embedding = "embed" in name or "lm_head" in name or name.endswith("wte.weight")
    same_inner = len({s[1:] for s in shapes}) == 1 and all(len(s) == 2 for s in shapes)
    other = next(i for i in inputs if i.info.shape != first.info.shape)
    if embedding and same_inner and allow_truncation:
        return (min(s[0] for s in shapes), *first.info.shape[1:]), True
    advice = (
        "Vocabularies differ: pass --allow-embedding-truncation to keep the leading rows "
        "that all have."
        if embedding and same_inner
        else "All models must have the same architecture."
    )
    raise InputError(
        f"shape of '{name}' in {other.model}: expected {first.info.shape} as in {first.model}, "
        f"got {other.info.shape}. {advice}"
    )

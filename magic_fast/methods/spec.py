"""What a merge method is: its parameters, how it computes, and what a reader wants to know of it.

No torch is imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from magic_fast.recipe import Recipe, per_expert

if TYPE_CHECKING:
    from magic_fast.ops.directions import Directions
    from magic_fast.ops.job import Job

Value = float | int | bool | str
Scope = Literal["per_tensor", "per_model"]
Kind = Literal["float", "int", "bool", "rescale", "choice", "pattern"]
BaseUse = Literal["required", "optional", "member", "none"]

_EXACT = 4  # more copies of a matrix with svd="exact", and the task vectors in float64
RESCALES = ("none", "keep_probability", "l1", "l2", "linf")


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of one method.

    ``default`` holds under preset ``mergekit``; ``own_default`` under the others unless
    ``preset_defaults`` names one. ``None`` means there is none. A ``per_model`` parameter has one
    value for each expert, a ``per_tensor`` one a single value for each output tensor.
    """

    name: str
    scope: Scope = "per_tensor"
    kind: Kind = "float"
    default: Value | None = None
    own_default: Value | None = None
    preset_defaults: Mapping[str, Value] = field(default_factory=dict)
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()
    required: bool = False
    aliases: tuple[str, ...] = ()
    argument: str = ""
    random_trim: bool = False
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases, the name first."""
        return (self.name, *self.aliases)

    @property
    def numeric(self) -> bool:
        """Whether values lie on a line, so that a gradient may run between two of them."""
        return self.kind in ("float", "int")

    def default_for(self, preset: str) -> Value | None:
        """The value of an absent parameter under ``preset``."""
        if preset == "mergekit":
            return self.default
        own = self.default if self.own_default is None else self.own_default
        return self.preset_defaults.get(preset, own)

    def expected(self) -> str:
        """The accepted values in words, for messages."""
        if self.kind == "bool":
            return "true or false"
        if self.kind == "rescale":
            return f"true, false or one of {', '.join(RESCALES)}"
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}"
        if self.kind == "pattern":
            return "a regular expression for tensor names"
        noun = "a whole number" if self.kind == "int" else "a finite number"
        low, high = math.isfinite(self.low), math.isfinite(self.high)
        if low and high:
            left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
            noun += f" in {left}{self.low:g}, {self.high:g}{right}"
        elif low:
            noun += f" {'>' if self.low_open else '>='} {self.low:g}"
        return noun + (f" ({self.note})" if self.note else "")

    def accepts(self, value: object) -> bool:
        """Whether one scalar is of the right type and in range."""
        if self.kind == "rescale":
            return isinstance(value, bool) or value in RESCALES
        if self.kind == "choice":
            return value in self.choices
        if self.kind == "pattern":
            return is_pattern(value)
        if self.kind == "bool":
            return isinstance(value, bool) or (is_number(value) and value in (0, 1))
        if not is_number(value) or not math.isfinite(value):
            return False
        if self.kind == "int" and value != int(value):
            return False
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def normalized(self, value: Value, preset: str) -> Value:
        """``value`` (already accepted) as the type the method expects."""
        if self.kind == "bool":
            return bool(value)
        if self.kind == "int":
            return int(value)
        if self.kind == "float":
            return float(value)
        if self.kind == "rescale" and isinstance(value, bool):
            if not value:
                return "none"
            return "keep_probability" if self.random_trim and preset != "mergekit" else "l1"
        return value


def is_pattern(value: object) -> TypeGuard[str]:
    """Whether ``value`` is a regular expression."""
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is an int or a float and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Question:
    """What a mean of directions has to know of a tensor to say which of its vectors it means.

    Attributes:
        experts: K.
        has_base: whether there is a base.
        arguments: of the method.
        preset: whose rules.
        name: of the tensor, for messages.
    """

    experts: int
    has_base: bool
    arguments: Mapping[str, Any]
    preset: str
    name: str

    def weights(self) -> tuple[float, ...]:
        return per_expert(self.arguments["weights"], self.experts, "weights")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from: a paper's title, or a project; and the paper's number on arXiv,
    or ''."""

    title: str
    arxiv: str = ""


@dataclass(frozen=True)
class MethodSpec:
    """One merge method. It computes in one of three ways, and has that field alone.

    Attributes:
        name: in the YAML and in Python.
        parameters: what it takes, in the order in which they are shown.
        base: whether the base is the point that task vectors start from (``required``), may be
            (``optional``), is itself one of the models that are merged (``member``), or only
            donates config and tokenizer (``none``).
        min_experts, max_experts: how many models it takes beside the base; None: any number.
        recipe: from K and the arguments (every one, by its Python name) to the stages of a loop
            over elements, before a preset changes them. Fused, and streamed from checkpoints.
        directions: which vectors of a tensor it adds up, with coefficients that follow from their
            inner products. Runs in pieces too.
        function: from a job, the arguments and the preset to the merged tensor, in float32
            (float64 of float64 inputs), before the calibration and the final rounding. Holds whole
            tensors.
        summary: what it does, in a line.
        use_when: what speaks for it.
        paper: where it comes from.
        reads: passes over base and experts; '' of a recipe, whose stages tell.
        holds: whole tensors in float32 beside base and experts, in words; '' of a recipe.
        workspace: from the arguments, K and the number of dimensions of a tensor to the bytes that
            each of its elements takes beside base, experts and result; None: none.
        may_refuse: whether it refuses tensors by their values, so that nothing but trying tells.
        home: module and name of the function that a user registered; '' of the package's methods.
        source: of a function that a user registered and that is no recipe, what tells its code from
            another's.
    """

    name: str
    parameters: tuple[ParameterSpec, ...] = ()
    base: BaseUse = "required"
    min_experts: int = 1
    max_experts: int | None = None
    recipe: Callable[[int, Mapping[str, Any]], Recipe] | None = None
    directions: Callable[[Question], Directions] | None = None
    function: Callable[[Job, Mapping[str, Any], str], Any] | None = None
    summary: str = ""
    use_when: str = ""
    paper: Paper = Paper("")
    reads: str = ""
    holds: str = ""
    workspace: Callable[[Mapping[str, Any], int, int], int] | None = None
    may_refuse: bool = False
    home: str = ""
    source: Callable[[], str] | None = None

    def find(self, name: str) -> ParameterSpec | None:
        """The parameter called ``name``, by name or alias."""
        return next((spec for spec in self.parameters if name in spec.names), None)

    def parameter_names(self) -> tuple[str, ...]:
        """All parameter names, without aliases."""
        return tuple(spec.name for spec in self.parameters)

    def uses_base(self, base_model: str | None) -> bool:
        """Whether the base takes part in the merge as its base."""
        if self.base in ("optional", "member"):
            return base_model is not None
        return self.base == "required"


def decompositions(copies: int) -> Callable[[Mapping[str, Any], int, int], int]:
    """The ``workspace`` of a method that holds so many float64 copies of a matrix at once, beside
    what every method on whole tensors holds (K + 2 in float32); 0 where nothing is decomposed.

    >>> iso_c = decompositions(8)
    >>> iso_c({}, 3, 2), iso_c({}, 3, 1), iso_c({"svd": "exact"}, 3, 2)
    (64, 0, 120)
    """

    def workspace(arguments: Mapping[str, Any], num_experts: int, ndim: int) -> int:
        if ndim != 2:
            return 0
        exact = _EXACT + num_experts if arguments.get("svd") == "exact" else 0
        return 8 * (copies + exact)

    return workspace

"""Which parameters a YAML may give to which method: scope, type, range and defaults.

One row of :data:`METHODS` per method. Names are mergekit's where mergekit has the method;
:attr:`ParameterSpec.argument` is the keyword that the Python interface uses for the same thing.
Switching a method on is setting ``available`` in its row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeGuard

from magic_fast.errors import ConfigError

Value = float | int | bool | str
Scope = Literal["per_tensor", "per_model"]
Kind = Literal["float", "int", "bool", "rescale", "choice", "pattern"]
BaseUse = Literal["required", "optional", "member", "none"]

PRESETS = ("mergekit", "default", "peft", "ties_merging", "fusion_bench", "magic", "sd_mecha")
RESCALES = ("none", "keep_probability", "l1", "l2", "linf")

#: Accepted and without any effect: why.
NO_EFFECT = {"int8_mask": "masks are never stored here"}


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
class MethodSpec:
    """One merge method as a YAML sees it.

    ``base`` says whether ``base_model`` is the point that task vectors start from (``required``),
    may be (``optional``), is itself one of the models that are merged (``member``), or only donates
    config and tokenizer (``none``).
    """

    name: str
    parameters: tuple[ParameterSpec, ...] = ()
    base: BaseUse = "required"
    min_experts: int = 1
    max_experts: int | None = None
    available: bool = False

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


_WEIGHT = ParameterSpec("weight", "per_model", default=1.0, argument="weights")
_PERCENT = "a fraction, never a percent: 0.5 keeps half"


def _lambda(own: float = 1.0, **presets: float) -> ParameterSpec:
    return ParameterSpec("lambda", default=1.0, own_default=own, preset_defaults=presets,
                         aliases=("scale",), argument="scale")  # fmt: skip


def _flag(name: str, default: bool) -> ParameterSpec:
    return ParameterSpec(name, kind="bool", default=default)


def _density(own: float) -> ParameterSpec:
    return ParameterSpec("density", "per_model", default=1.0, own_default=own, low=0.0, high=1.0,
                         low_open=True, note=_PERCENT)  # fmt: skip


def _number(name: str, default: float, low: float = -math.inf, high: float = math.inf,
            *, low_open: bool = False) -> ParameterSpec:  # fmt: skip
    return ParameterSpec(name, default=default, low=low, high=high, low_open=low_open)


def _task(
    name: str,
    *extra: ParameterSpec,
    normalize: bool = False,
    random_trim: bool = False,
    scale: ParameterSpec | None = None,
) -> MethodSpec:
    """A method on task vectors: weight, lambda, normalize and, where it trims, rescale."""
    common = [_WEIGHT, *extra, scale or _lambda(), _flag("normalize", normalize), _ALIGN]
    if name.endswith("ties") or name == "della":
        common += [_VOTE, _REDUCE]
    if extra:
        common.append(
            ParameterSpec("rescale", kind="rescale", default=random_trim, random_trim=random_trim)
        )
    return MethodSpec(name, tuple(common), available=True)


_EPSILON = ParameterSpec("epsilon", "per_model", default=0.15, low=0.0)
_GAMMA = ParameterSpec("gamma", "per_model", default=0.01, low=0.0, high=1.0, high_open=True)
_T = ParameterSpec("t", low=0.0, high=1.0, required=True, preset_defaults={"magic": 0.5})
_VOTE = ParameterSpec(
    "vote",
    kind="choice",
    choices=("mass", "count", "total", "frequency"),
    aliases=("majority_sign_method",),
)  # absent: the preset's own rule; total and frequency are PEFT's words for mass and count
_REDUCE = ParameterSpec(
    "reduce", kind="choice", choices=("sum", "mean", "weighted_mean", "max")
)  # absent: by normalize, or the preset's own rule
_ALIGN = ParameterSpec("align", kind="choice", choices=("none", "min_norm"))  # absent: none
_RESCALE = ParameterSpec("rescale", kind="rescale", default=False)
_PER_ROW = _flag("per_row", False)
_RAM_EPSILON = _number("epsilon", 1e-5, 0.0)
_CONSENSUS_ON = ParameterSpec("on", kind="choice", default="sum", choices=("sum", "ties"))
_CONSENSUS_DENSITY = ParameterSpec(
    "density", "per_model", default=1.0, preset_defaults={"magic": 0.2}, low=0.0, high=1.0,
    low_open=True, note=_PERCENT,
)  # fmt: skip
_SCOPE = ParameterSpec("scope", kind="choice", default="model", choices=("model", "tensor"))
_SVD = ParameterSpec("svd", kind="choice", default="auto", choices=("auto", "exact"))
_TENSORS = ParameterSpec("tensors", kind="pattern")  # absent: the method's own rule of names
_TIES_LAMBDA = _lambda(1.0, fusion_bench=0.3)
_SUM_LAMBDA = _lambda(1.0, fusion_bench=0.3, magic=0.3)

_ROWS = (
    MethodSpec("linear", (_WEIGHT, _flag("normalize", True)), base="none", available=True),
    MethodSpec("average", (_lambda(), _ALIGN), base="optional", available=True),
    _task("task_arithmetic", scale=_SUM_LAMBDA),
    _task("ties", _density(0.2), normalize=True, scale=_TIES_LAMBDA),
    _task("dare_linear", _density(0.5), random_trim=True),
    _task("dare_ties", _density(0.5), random_trim=True),
    _task("della", _density(0.5), _EPSILON, normalize=True, random_trim=True),
    _task("della_linear", _density(0.5), _EPSILON, random_trim=True),
    _task("breadcrumbs", _density(0.9), _GAMMA),
    _task("breadcrumbs_ties", _density(0.9), _GAMMA),
    _task("magnitude_prune", _density(0.5)),
    MethodSpec("slerp", (_T, _PER_ROW), max_experts=1, available=True),
    MethodSpec(
        "passthrough", (ParameterSpec("scale", "per_model", default=1.0),),
        base="none", max_experts=1, available=True,
    ),
    MethodSpec(
        "nuslerp",
        (_WEIGHT, _flag("nuslerp_flatten", True), _flag("nuslerp_row_wise", False)),
        base="optional", min_experts=2, max_experts=2, available=True,
    ),
    MethodSpec(
        "multislerp",
        (_WEIGHT, _flag("normalize_weights", True), _number("eps", 1e-8, 0.0, low_open=True)),
        base="optional", available=True,
    ),
    MethodSpec(
        "karcher",
        (ParameterSpec("max_iter", kind="int", default=10, low=1), _number("tol", 1e-5, 0.0)),
        base="member", available=True,
    ),
    MethodSpec(
        "nearswap", (ParameterSpec("t", low=0.0, required=True),), max_experts=1, available=True
    ),
    MethodSpec("arcee_fusion", (), max_experts=1, available=True),
    MethodSpec("model_stock", (_flag("filter_wise", False),), min_experts=2, available=True),
    MethodSpec("sce", (_number("select_topk", 1.0, 0.0, 1.0, low_open=True),), available=True),
    MethodSpec("ram", (_RAM_EPSILON, _ALIGN, _RESCALE), available=True),
    MethodSpec(
        "ramplus_tl",
        (_number("r", 0.1), _number("alpha", 0.2, 0.0), _RAM_EPSILON, _ALIGN, _RESCALE),
        available=True,
    ),
    MethodSpec("magmax", (_lambda(0.5), _ALIGN), available=True),
    MethodSpec("emr_unified", (_lambda(), _ALIGN), available=True),
    MethodSpec(
        "consensus_ta",
        (ParameterSpec("tall_mask_lambda", "per_model", default=0.4, low=0.0), _CONSENSUS_ON,
         _CONSENSUS_DENSITY, _lambda(), ParameterSpec("min_tasks", kind="int", default=2, low=1),
         _ALIGN, _RESCALE),
        available=True,
    ),
    MethodSpec("iso_c", (_lambda(), _SVD, _TENSORS), available=True),
    MethodSpec(
        "iso_cts", (_number("common_space_fraction", 0.8, 0.0, 1.0), _lambda(), _SVD, _TENSORS),
        available=True,
    ),
    MethodSpec("tsv_m", (_lambda(), _SVD, _TENSORS), available=True),
    MethodSpec(
        "pcb", (_number("ratio", 0.1, 0.0, 1.0, low_open=True), _SCOPE, _lambda(1.2)),
        available=True,
    ),
    MethodSpec(
        "star", (_number("eta", 0.4, 0.0, 1.0, low_open=True), _lambda()), available=True
    ),
)  # fmt: skip

#: Every method a YAML may name, by name.
METHODS: Mapping[str, MethodSpec] = {row.name: row for row in _ROWS}


def available_methods() -> tuple[str, ...]:
    """Names of the methods that can be run, sorted."""
    return tuple(sorted(name for name, row in METHODS.items() if row.available))


def known_parameters(methods: Iterable[MethodSpec] = _ROWS) -> frozenset[str]:
    """Names and aliases of the parameters of ``methods`` (default: of all)."""
    names = {name for row in methods for spec in row.parameters for name in spec.names}
    return frozenset(names | NO_EFFECT.keys())


def method_spec(name: str) -> MethodSpec:
    """The row of an available method.

    Raises:
        ConfigError: unknown, or known and not available.
    """
    row = METHODS.get(name)
    if row is None or not row.available:
        raise ConfigError(
            f"method cannot run for {name}: expected one of {', '.join(available_methods())}, "
            f"got {name!r}. Choose one of these."
        )
    return row

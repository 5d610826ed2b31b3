"""What to calibrate and how: the public settings of WSC, and their resolution for one tensor
(docs/methods.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from magic_fast.calibration.sensitivity.lists import is_sensitive, names_of, unknown_names
from magic_fast.errors import InputError
from magic_fast.recipe import Direction, EpsMode, Granularity, RowCalibration, Variant

# Embeddings and heads: their rows are tokens or classes, not units of a hidden layer.
_EMBEDDING_OR_HEAD = re.compile(
    r"(^|\.)([a-z0-9_]*embed[a-z0-9_]*|wte|wpe|shared|lm_head|classifier|score)(\.|$)",
    re.IGNORECASE,
)
# Architectures whose projections are stored [in, out] (transformers' Conv1D).
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_NAMES = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
_EXPERT_STACK = re.compile(r"(^|\.)experts(\.|$)")


def is_calibratable_magic(name: str, shape: Sequence[int]) -> bool:
    """The authors' rule: any name with "conv", else 2-D with "weight" and without the substring
    "ln"."""
    if "conv" in name:
        return len(shape) >= 1
    return "weight" in name and "ln" not in name and len(shape) == 2


def is_calibratable_general(name: str, shape: Sequence[int]) -> bool:
    """Every weight of two or more dimensions except embeddings and heads; a bare tensor ('') of
    two or more.

    >>> is_calibratable_general("model.layers.0.mlp.up_proj.weight", (8, 4))
    True
    >>> is_calibratable_general("model.embed_tokens.weight", (8, 4))
    False
    """
    return len(shape) >= 2 and _EMBEDDING_OR_HEAD.search(name) is None


@dataclass(frozen=True)
class TensorFilter:
    """Tensor selection by regular expressions (``re.search``) on top of the general rule.

    A name that matches any of ``exclude`` is out; else one that matches any of ``include`` is in,
    whatever the general rule says of embeddings and heads; with no ``include`` the general rule
    decides.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as e:
                raise InputError(
                    f"pattern {pattern!r} of calibration tensors: expected a regular "
                    "expression, got an "
                    f"error: {e}. Escape special characters with a backslash."
                ) from None

    def __call__(self, name: str, shape: Sequence[int]) -> bool:
        if any(re.search(p, name) for p in self.exclude):
            return False
        if self.include:
            return len(shape) >= 1 and any(re.search(p, name) for p in self.include)
        return is_calibratable_general(name, shape)


@dataclass(frozen=True)
class WeightCalibration:
    """Settings of the weight-space calibration (WSC) of MAGIC, arXiv 2512.19320.

    Attributes:
        variant: ``manifold`` (the paper's), ``manifold_exact``, ``sphere``, ``spectral`` (per
            tensor).
        granularity: ``row`` or ``tensor``. ``spectral`` per row is ``sphere`` with p = 2.
        p: norm of ``sphere``: an integer ≥ 1 or infinity.
        eps_mode: ``relative`` (scale-free), ``absolute`` (the authors' 1e-8s), ``none``.
        guards: rows without a direction (zero or non-finite) keep their values, and are reported.
        clamp: (low, high) that ξ is limited to, or None.
        strength: exponent of ξ: 0 does nothing, 1 calibrates fully.
        scale: factor on calibrated rows besides ξ (ξ itself cancels any factor of the merge).
        tensors: ``"general"``, ``"magic"`` (the authors' name rule) or a :class:`TensorFilter`.
        direction: ``auto`` follows ``sensitive``; ``free``, ``grow`` and ``shrink`` force one side.
        sensitive: names of tensors (or of modules, for all in them) that may only shrink while all
            others may only grow; None: two-sided; an empty list is a list. Their order is nothing.
        row_axis: axis (or axes) of output units; None: by the model's layout, else 0.

    >>> WeightCalibration(variant="sphere", p=1).variant
    <Variant.SPHERE: 'sphere'>
    """

    variant: Variant = Variant.MANIFOLD
    granularity: Granularity | None = None
    p: float = 2
    eps_mode: EpsMode = EpsMode.RELATIVE
    guards: bool = True
    clamp: tuple[float, float] | None = (0.1, 10.0)
    strength: float = 1.0
    scale: float = 1.0
    tensors: str | TensorFilter = "general"
    direction: Direction = Direction.AUTO
    sensitive: tuple[str, ...] | None = None
    row_axis: int | tuple[int, ...] | None = None
    _sensitive_set: frozenset[str] = field(
        init=False, repr=False, compare=False, default=frozenset()
    )

    def __post_init__(self) -> None:
        for name, kind in (("variant", Variant), ("eps_mode", EpsMode), ("direction", Direction)):
            object.__setattr__(self, name, word(kind, getattr(self, name), name))
        if self.granularity is None:
            default = Granularity.TENSOR if self.variant is Variant.SPECTRAL else Granularity.ROW
            object.__setattr__(self, "granularity", default)
        object.__setattr__(self, "granularity", word(Granularity, self.granularity, "granularity"))
        object.__setattr__(self, "p", norm_of(self.p))
        object.__setattr__(self, "clamp", bounds_of(self.clamp))
        check_finite(self, ("strength", "scale"))
        if isinstance(self.tensors, str) and self.tensors not in ("general", "magic"):
            raise InputError(
                "calibration tensors: expected 'general', 'magic' or a TensorFilter, got "
                f"{self.tensors!r}."
            )
        object.__setattr__(self, "sensitive", names_of(self.sensitive, "tensor names"))
        object.__setattr__(self, "_sensitive_set", frozenset(self.sensitive or ()))

    def selects(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the tensor is calibrated at all."""
        if self.tensors == "general":
            return is_calibratable_general(name, shape)
        if self.tensors == "magic":
            return is_calibratable_magic(name, shape)
        assert isinstance(self.tensors, TensorFilter)
        return self.tensors(name, shape)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses sensitive names that the model does not have."""
        unknown = unknown_names(self.sensitive or (), names)
        if unknown:
            raise InputError(
                f"sensitive tensor {unknown[0]!r}: expected a tensor of the model, got an "
                "unknown name"
                f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}. "
                "Check the list against the model's tensor names."
            )

    def resolve(
        self,
        name: str,
        shape: Sequence[int],
        weights: Sequence[float],
        *,
        model_type: str | None = None,
        row_axis: int | tuple[int, ...] | None = None,
    ) -> RowCalibration | None:
        """What the kernels need for one tensor, or None where it is not calibrated."""
        if not self.selects(name, shape) or math.prod(shape) == 0:
            return None
        axes = self._axes(name, shape, model_type, row_axis)
        rows = math.prod(shape[a] for a in axes)
        direction = self.direction
        if direction is Direction.AUTO:
            direction = Direction.FREE
            if self.sensitive is not None:
                held = is_sensitive(name, self._sensitive_set)
                direction = Direction.SHRINK if held else Direction.GROW
        included = tuple(w != 0 for w in weights)
        if not any(included):
            return None
        assert self.granularity is not None
        return RowCalibration(
            rows=rows,
            cols=math.prod(shape) // rows,
            axes=axes,
            variant=self.variant,
            granularity=self.granularity,
            p=self.p,
            eps_mode=self.eps_mode,
            guards=self.guards,
            clamp=self.clamp,
            strength=self.strength,
            scale=self.scale,
            direction=direction,
            included=included,
        )

    def _axes(
        self,
        name: str,
        shape: Sequence[int],
        model_type: str | None,
        row_axis: int | tuple[int, ...] | None,
    ) -> tuple[int, ...]:
        chosen = row_axis if row_axis is not None else self.row_axis
        dims = len(shape)
        if chosen is not None:
            axes = (chosen,) if isinstance(chosen, int) else tuple(chosen)
            for a in axes:
                if not -dims <= a < dims:
                    raise InputError(
                        f"row_axis for {name or 'the tensor'}: expected an axis of a "
                        f"{dims}-dimensional "
                        f"tensor, got {a}."
                    )
            return tuple(a % dims for a in axes)
        if model_type in _CONV1D_MODELS and dims == 2 and _CONV1D_NAMES.search(name):
            return (1,)
        if dims == 3 and _EXPERT_STACK.search(name):
            return (0, 1)
        return (0,)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def norm_of(value: object) -> float:
    """The p of a norm: an integer >= 1 or infinity."""
    p = math.inf if value in ("inf", math.inf) else value
    if not is_number(p) or (p != math.inf and (p != p // 1 or p < 1)):  # type: ignore[operator]
        raise InputError(f"calibration p: expected an integer >= 1 or 'inf', got {value!r}.")
    return p


def bounds_of(value: object) -> tuple[float, float] | None:
    """The (low, high) of a clamp, or None."""
    if value is None:
        return None
    low = high = math.nan  # no bound holds of them
    if isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value)):
        low, high = float(value[0]), float(value[1])
    if not 0 <= low <= high:
        raise InputError(
            f"calibration clamp: expected (low, high) with 0 <= low <= high, got {value!r}."
        )
    return low, high


def check_finite(settings: object, names: Iterable[str]) -> None:
    """Refuses settings that are not finite numbers."""
    for name in names:
        value = getattr(settings, name)
        if not is_number(value) or not math.isfinite(value):
            raise InputError(f"calibration {name}: expected a finite number, got {value!r}.")


def word(kind: type, value: object, what: str) -> object:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(repr(str(v)) for v in kind)  # type: ignore[attr-defined]
        raise InputError(f"calibration {what}: expected one of {allowed}, got {value!r}.") from None


#: What one word may ask for: the default, or a variant of WSC.
CALIBRATE_WORDS = ("wsc", *(variant.value for variant in Variant))


def as_calibration(
    value: str | WeightCalibration | Mapping[str, object] | None,
) -> WeightCalibration | None:
    """None, ``"wsc"`` (the defaults), the name of a variant, settings, or a mapping of them."""
    if value is None or isinstance(value, WeightCalibration):
        return value
    if isinstance(value, Mapping):
        return WeightCalibration(**known_settings(WeightCalibration, value))
    if value == "wsc":
        return WeightCalibration()
    if value in set(Variant):
        return WeightCalibration(variant=Variant(value))
    raise InputError(
        f"calibrate: expected None, {', '.join(map(repr, CALIBRATE_WORDS))} or a "
        f"WeightCalibration, got {value!r}. "
        "fsc, dsc, svc and lines run on a merged model: `magic-fast methods NAME` says how."
    )


def known_settings(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping, refused where it has a name that ``kind`` lacks."""
    known = [f.name for f in fields(kind) if f.init]
    for name in value:
        if name not in known:
            raise InputError(
                f"calibration {name!r}: expected one of {', '.join(known)}, got an unknown one."
            )
    return dict(value)

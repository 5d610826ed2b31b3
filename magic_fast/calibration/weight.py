"""What to calibrate and how: the public settings of WSC, and their resolution for one tensor
(docs/methods.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from magic_fast.calibration.builtin import CALIBRATIONS, ON_MERGED_MODELS, Calibration
from magic_fast.calibration.registry import (
    find,
    is_variant,
    left_out,
    resolved,
    variant_of,
    variants,
)
from magic_fast.calibration.sensitivity.lists import is_sensitive, refuse_unknown
from magic_fast.calibration.tensors import (
    TensorFilter,
    is_calibratable_general,
    is_calibratable_magic,
    row_axes,
)
from magic_fast.calibration.values import check_settings, default_of, known_settings, setting
from magic_fast.errors import InputError
from magic_fast.models import Role
from magic_fast.recipe import Direction, EpsMode, Granularity, RowCalibration, Variant

#: Axes of output units, or patterns of names with theirs.
RowAxis: TypeAlias = int | tuple[int, ...] | Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True)
class WeightCalibration:
    """Settings of the weight-space calibration (WSC) of MAGIC, arXiv 2512.19320.

    Attributes:
        variant: ``manifold`` (the paper's), ``manifold_exact``, ``sphere``, ``spectral`` (per
            tensor), or one that is registered.
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
        row_axis: axis (or axes) of output units; None: by what the tensor is to its model. Or a
            mapping of regular expressions (``re.search``) to them: the first that fits a name
            counts, names that none fits are as with None.

    >>> WeightCalibration(variant="sphere", p=1).variant
    <Variant.SPHERE: 'sphere'>
    """

    variant: Variant | str = setting(
        RowCalibration.variant,
        "variant",
        "how the coefficient of a row is computed (default: {default})",
    )
    granularity: Granularity | None = setting(
        None, Granularity, "what shares a coefficient (default: row; of spectral: tensor)"
    )
    p: float = setting(RowCalibration.p, "norm")
    eps_mode: EpsMode = setting(
        RowCalibration.eps_mode, EpsMode,
        "relative is scale-free (default); absolute is what the authors' code has",
    )  # fmt: skip
    guards: bool = setting(RowCalibration.guards, "flag")
    clamp: tuple[float, float] | None = setting(
        RowCalibration.clamp, "bounds", "bounds of a coefficient, or none (default: {default})"
    )
    strength: float = setting(
        RowCalibration.strength,
        "exponent",
        "exponent of a coefficient; 0 does nothing (default: {default})",
    )
    scale: float = setting(RowCalibration.scale, "factor")
    tensors: str | TensorFilter = setting("general", "tensors")
    direction: Direction = setting(Direction.AUTO, Direction)
    sensitive: tuple[str, ...] | None = setting(
        None, "tensor names",
        "JSON list of tensor names, or object of name: score (the ten lowest count), that may "
        "only shrink; all others may only grow",
    )  # fmt: skip
    row_axis: RowAxis | None = setting(None, "axes")
    _sensitive_set: frozenset[str] = field(
        init=False, repr=False, compare=False, default=frozenset()
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "variant", variant_of(self.variant))
        found = find(self.variant)
        assert found is not None
        default = found.granularity
        if self.granularity is None:
            object.__setattr__(self, "granularity", default)
        check_settings(self)
        if isinstance(self.tensors, str) and self.tensors not in ("general", "magic"):
            raise InputError(
                "calibration tensors: expected 'general', 'magic' or a TensorFilter, got "
                f"{self.tensors!r}."
            )
        object.__setattr__(self, "_sensitive_set", frozenset(self.sensitive or ()))
        self._refuse_idle(default)

    def _refuse_idle(self, granularity: Granularity) -> None:
        """Refuses settings that a registered variant does not know."""
        found = find(self.variant)
        if found is None or found.function is None:
            return
        for name in sorted(idle_settings(found)):
            value, default = getattr(self, name), default_of(WeightCalibration, name)
            if value != default:
                raise InputError(
                    f"calibration {name}: expected {default!r} with variant {found.name!r}, to "
                    f"which it means nothing, got {value!r}. Leave it out."
                )
        if found.function.whole and self.granularity is not granularity:
            raise InputError(
                f"calibration granularity: expected '{granularity}' with variant {found.name!r}, "
                f"got '{self.granularity}'. Leave it out."
            )

    def with_axes(self, row_axis: RowAxis | None) -> WeightCalibration:
        """The settings with the ``row_axis`` of a call, which stands before their own."""
        return self if row_axis is None else replace(self, row_axis=row_axis)

    def selects(self, name: str, shape: Sequence[int], role: Role | None = None) -> bool:
        """Whether the tensor is calibrated at all."""
        if self.tensors == "general":
            return is_calibratable_general(name, shape, role)
        if self.tensors == "magic":
            return is_calibratable_magic(name, shape)
        assert isinstance(self.tensors, TensorFilter)
        return self.tensors(name, shape, role)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses sensitive names that the model does not have, and patterns of ``row_axis`` that
        fit none of its names."""
        if isinstance(self.row_axis, Mapping):
            names = list(names)
            for pattern in self.row_axis:
                if not any(re.search(pattern, name) for name in names):
                    raise InputError(
                        f"pattern {pattern!r} of row_axis: expected one that fits the name of a "
                        f"tensor, got one that fits none of {len(names)}. The first is "
                        f"{names[0] if names else 'none'!r}; patterns are searched in the name."
                    )
        refuse_unknown(self.sensitive, names, "tensor", "a tensor", "tensor names")

    def resolve(
        self,
        name: str,
        shape: Sequence[int],
        weights: Sequence[float],
        *,
        role: Role | None = None,
        row_axis: RowAxis | None = None,
    ) -> RowCalibration | None:
        """What the kernels need for one tensor, or None where it is not calibrated.

        Args:
            role: what the tensor is to its model; None of one that comes without a model.

        Raises:
            InputError: the axes of its output units are not known.
        """
        if not self.selects(name, shape, role) or math.prod(shape) == 0:
            return None
        axes = self._axes(name, shape, role, row_axis)
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
            variant=resolved(self.variant, name),
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
        role: Role | None,
        row_axis: RowAxis | None,
    ) -> tuple[int, ...]:
        chosen = row_axis if row_axis is not None else self.row_axis
        dims = len(shape)
        if isinstance(chosen, Mapping):
            chosen = next((axes for p, axes in chosen.items() if re.search(p, name)), None)
        if chosen is None and self.granularity is Granularity.TENSOR:
            return (0,)
        if chosen is None:
            return row_axes(name, role)
        axes = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        for a in axes:
            if not -dims <= a < dims:
                raise InputError(
                    f"row_axis for {name or 'the tensor'}: expected an axis of a "
                    f"{dims}-dimensional tensor, got {a}."
                )
        return tuple(a % dims for a in axes)


def idle_settings(calibration: Calibration) -> set[str]:
    """The settings that mean nothing to a registered variant."""
    assert calibration.function is not None
    idle = {"p", "eps_mode"}
    if calibration.function.changes:
        idle |= {"guards", "clamp", "strength", "scale", "direction", "sensitive"}
    return idle


#: What one word may ask for: the default, or a variant of WSC. Registered ones come on top.
CALIBRATE_WORDS = ("wsc", *(name for name, c in CALIBRATIONS.items() if c.space == "weight"))


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
    if is_variant(value):
        return WeightCalibration(variant=value)
    words, beside = ", ".join(map(repr, ("wsc", *variants()))), list(ON_MERGED_MODELS)
    raise InputError(
        f"calibrate: expected None, {words} or a WeightCalibration, got {value!r}"
        f"{left_out(value)}. {', '.join(beside[:-1])} and {beside[-1]} run on a merged model: "
        "`magic-fast methods NAME` says how."
    )

"""How feature space calibration (FSC) runs: its public settings (docs/calibration.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from magic_fast.calibration.sensitivity.lists import names_of, unknown_names
from magic_fast.calibration.weight import (
    bounds_of,
    check_finite,
    known_settings,
    norm_of,
    word,
)
from magic_fast.errors import InputError


class Reduction(str, Enum):
    """How the ratios of all positions become one ξ of a layer and a task."""

    RATIO_OF_SUMS = "ratio_of_sums"
    MEAN = "mean"
    MEDIAN = "median"

    def __str__(self) -> str:
        return self.value


class Deploy(str, Enum):
    """What carries ξ: the weights, or hooks over the base's and the merged weights."""

    FOLD = "fold"
    HOOKS = "hooks"

    def __str__(self) -> str:
        return self.value


class FeatureGranularity(str, Enum):
    """What shares a ξ."""

    LAYER = "layer"
    CHANNEL = "channel"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class FeatureCalibration:
    """Settings of the feature space calibration (FSC) of MAGIC, arXiv 2512.19320.

    Attributes:
        reduction: ``ratio_of_sums`` Σ‖h_k − h_0‖ ÷ Σ‖h_m − h_0‖ (least noisy), or ``mean`` or
            ``median`` of the ratios of single positions.
        p: norm along the feature dimension: an integer ≥ 1 or infinity.
        granularity: one ξ for a ``layer`` or for each output ``channel``.
        sequential: take the layers in order, each on what the calibrated ones before it give.
        clamp: (low, high) that ξ is limited to, or None.
        strength: exponent of ξ: 0 does nothing, 1 calibrates fully.
        scale: factor on calibrated layers besides ξ (ξ itself cancels any factor of the merge).
        min_denominator: positions whose ‖h_m − h_0‖ lies below this share of its mean over the
            batch have no part in ``mean`` and ``median``; those where it is 0 never have.
        sensitive: names of tensors or of modules (with all in them) whose layers may only shrink.

    >>> FeatureCalibration(p=2).reduction
    <Reduction.RATIO_OF_SUMS: 'ratio_of_sums'>
    """

    reduction: Reduction = Reduction.RATIO_OF_SUMS
    p: float = 1
    granularity: FeatureGranularity = FeatureGranularity.LAYER
    sequential: bool = False
    clamp: tuple[float, float] | None = (0.1, 10.0)
    strength: float = 1.0
    scale: float = 1.0
    min_denominator: float = 0.0
    sensitive: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("reduction", Reduction), ("granularity", FeatureGranularity)):
            object.__setattr__(self, name, word(kind, getattr(self, name), name))
        object.__setattr__(self, "p", norm_of(self.p))
        object.__setattr__(self, "clamp", bounds_of(self.clamp))
        check_finite(self, ("strength", "scale", "min_denominator"))
        if not 0 <= self.min_denominator < 1:
            raise InputError(
                "calibration min_denominator: expected a share in [0, 1), got "
                f"{self.min_denominator!r}."
            )
        object.__setattr__(self, "sensitive", names_of(self.sensitive, "names"))

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses sensitive names that are neither a module nor a tensor of the model."""
        unknown = unknown_names(self.sensitive or (), names)
        if unknown:
            raise InputError(
                f"sensitive layer {unknown[0]!r}: expected a module or a tensor of the model, got "
                f"an unknown name{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}. "
                "Check the list against the model's names."
            )


def as_features(value: FeatureCalibration | Mapping[str, Any] | None) -> FeatureCalibration:
    """None (the defaults), settings, or a mapping of them."""
    if isinstance(value, FeatureCalibration):
        return value
    return FeatureCalibration(**known_settings(FeatureCalibration, value or {}))

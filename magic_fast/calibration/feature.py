"""How feature space calibration (FSC) runs: its public settings (docs/calibration.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from magic_fast.calibration.sensitivity.lists import refuse_unknown
from magic_fast.calibration.values import check_settings, known_settings, setting
from magic_fast.recipe import RowCalibration
from magic_fast.recipe.words import Word


class Reduction(Word):
    """How the ratios of all positions become one ξ of a layer and a task."""

    RATIO_OF_SUMS = "ratio_of_sums"
    MEAN = "mean"
    MEDIAN = "median"


class Deploy(Word):
    """What carries ξ: the weights, or hooks over the base's and the merged weights."""

    FOLD = "fold"
    HOOKS = "hooks"


class FeatureGranularity(Word):
    """What shares a ξ."""

    LAYER = "layer"
    CHANNEL = "channel"


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

    reduction: Reduction = setting(
        Reduction.RATIO_OF_SUMS,
        Reduction,
        "how positions become one coefficient (default: {default})",
    )
    p: float = setting(1, "norm", "1, 2, …, inf: of a feature ({default})")
    granularity: FeatureGranularity = setting(FeatureGranularity.LAYER, FeatureGranularity)
    sequential: bool = setting(
        False, "flag", "each layer on what the calibrated ones before it give"
    )
    clamp: tuple[float, float] | None = setting(RowCalibration.clamp, "bounds")
    strength: float = setting(RowCalibration.strength, "exponent")
    scale: float = setting(RowCalibration.scale, "factor")
    min_denominator: float = setting(0.0, "share")
    sensitive: tuple[str, ...] | None = setting(None, "names")

    def __post_init__(self) -> None:
        check_settings(self)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses sensitive names that are neither a module nor a tensor of the model."""
        refuse_unknown(self.sensitive, names, "layer", "a module or a tensor", "names")


def as_features(value: FeatureCalibration | Mapping[str, Any] | None) -> FeatureCalibration:
    """None (the defaults), settings, or a mapping of them."""
    if isinstance(value, FeatureCalibration):
        return value
    return FeatureCalibration(**known_settings(FeatureCalibration, value or {}))

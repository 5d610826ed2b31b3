"""The parameters that several methods share. Names are mergekit's where mergekit has them."""

from __future__ import annotations

import math

from magic_fast.methods.spec import ParameterSpec

#: Accepted and without any effect: the reason.
NO_EFFECT = {"int8_mask": "masks are never stored here"}

WEIGHT = ParameterSpec("weight", "per_model", default=1.0, argument="weights")
#: Absent: the preset's own rule; total and frequency are PEFT's words for mass and count.
VOTE = ParameterSpec(
    "vote",
    kind="choice",
    choices=("mass", "count", "total", "frequency"),
    aliases=("majority_sign_method",),
)
#: Absent: by normalize, or the preset's own rule.
REDUCE = ParameterSpec("reduce", kind="choice", choices=("sum", "mean", "weighted_mean", "max"))
#: Absent: none.
ALIGN = ParameterSpec("align", kind="choice", choices=("none", "min_norm"))
RESCALE = ParameterSpec("rescale", kind="rescale", default=False)
PERCENT = "a fraction, never a percent: 0.5 keeps half"


def scale(own: float = 1.0, **presets: float) -> ParameterSpec:
    """The factor on the merged change, ``lambda`` in the YAML."""
    return ParameterSpec("lambda", default=1.0, own_default=own, preset_defaults=presets,
                         aliases=("scale",), argument="scale")  # fmt: skip


def flag(name: str, default: bool) -> ParameterSpec:
    return ParameterSpec(name, kind="bool", default=default)


def density(own: float) -> ParameterSpec:
    """The fraction of each expert's entries that stays."""
    return ParameterSpec("density", "per_model", default=1.0, own_default=own, low=0.0, high=1.0,
                         low_open=True, note=PERCENT)  # fmt: skip


def number(name: str, default: float, low: float = -math.inf, high: float = math.inf,
           *, low_open: bool = False) -> ParameterSpec:  # fmt: skip
    return ParameterSpec(name, default=default, low=low, high=high, low_open=low_open)

"""The ``calibrate:`` block: what to calibrate and how. The mathematics is elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)


class Strict(BaseModel):
    """Base of all models of the YAML: frozen, and no key that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True
    )  # built with what holds them, when that is first used


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression, got {pattern!r}: {error}") from None
    return pattern


Regex = Annotated[str, AfterValidator(_regex)]


class TensorPatterns(Strict):
    """Tensors by name: any ``include`` found in it and no ``exclude``; no ``include`` means all."""

    include: tuple[Regex, ...] = ()
    exclude: tuple[Regex, ...] = ()


class SensitiveScores(Strict):
    """A JSON file ``{tensor name: score}``; the ``top`` names with the lowest score are sensitive.

    The score is what is left when that tensor alone is enlarged: low means sensitive. Without
    ``top`` it is what the file says, else 10.
    """

    path: str = Field(min_length=1)
    top: int | None = Field(default=None, ge=1, strict=True)


def _tag(words: str, mapping: str, sequence: str) -> Callable[[Any], str]:
    def tag(value: Any) -> str:
        if isinstance(value, Mapping | BaseModel):
            return mapping
        return sequence if isinstance(value, list | tuple) else words

    return tag


def _power(value: Any) -> Any:
    if value == "inf" or (isinstance(value, float) and value == math.inf):
        return "inf"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"expected a whole number >= 1 or 'inf', got {value!r}")


def _axis(value: Any) -> Any:
    """A whole number, or a list of them as a tuple."""
    axes = value if isinstance(value, list | tuple) else [value]
    if value is not None and (not axes or not all(type(axis) is int for axis in axes)):
        raise ValueError(f"expected a whole number or a list of them, got {value!r}")
    return tuple(axes) if isinstance(value, list | tuple) else value


Number = Annotated[float, Field(strict=True)]


_ON_MERGED_MODELS = ("fsc", "dsc", "svc", "lines")


class CalibrateConfig(Strict):
    """Weight-space calibration (WSC) as the YAML spells it; ``calibrate: wsc`` is all defaults,
    ``calibrate: sphere`` another variant's.

    Attributes:
        variant: which coefficient; ``manifold`` is the paper's.
        granularity: one coefficient per row or per tensor; None: per tensor for ``spectral``, else
            per row.
        p: norm of variant ``sphere``, a whole number >= 1 or ``"inf"``.
        eps_mode: how zero norms are kept out of denominators.
        guards: coefficients of zero or non-finite rows become 1.
        clamp: least and largest coefficient, or None for none.
        strength: exponent of the coefficient; 0 leaves everything as merged.
        scale: factor after calibration (calibration cancels any factor before it).
        tensors: which tensors: the general rule, the authors' rule, or patterns.
        direction: ``grow`` applies only coefficients > 1, ``shrink`` only < 1, ``free`` all;
            ``auto`` lets ``sensitive`` decide (with a list those shrink and all others grow).
        sensitive: names, or a JSON file of scores.
        row_axis: axis, or axes, of output units; None takes them from the model's layout.

    >>> CalibrateConfig(variant="sphere").as_dict()["p"]
    2
    """

    variant: Literal["manifold", "manifold_exact", "sphere", "spectral"] = "manifold"
    granularity: Literal["row", "tensor"] | None = None
    p: Annotated[int | Literal["inf"], BeforeValidator(_power)] = 2
    eps_mode: Literal["relative", "absolute", "none"] = "relative"
    guards: bool = Field(default=True, strict=True)
    clamp: tuple[Number, Number] | None = (0.1, 10.0)
    strength: Number = Field(default=1.0, ge=0.0)
    scale: Number = 1.0
    tensors: Annotated[
        Annotated[Literal["general", "magic"], Tag("<name>")]
        | Annotated[TensorPatterns, Tag("<patterns>")],
        Discriminator(_tag("<name>", "<patterns>", "<name>")),
    ] = "general"
    direction: Literal["auto", "free", "grow", "shrink"] = "auto"
    sensitive: (
        Annotated[
            Annotated[tuple[str, ...], Tag("<names>")]
            | Annotated[SensitiveScores, Tag("<scores>")],
            Discriminator(_tag("<names>", "<scores>", "<names>")),
        ]
        | None
    ) = None
    row_axis: Annotated[int | tuple[int, ...] | None, BeforeValidator(_axis)] = None

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: Any) -> Any:
        """``wsc`` for the defaults, a variant's name for it; ``sensitive: file.json`` with
        ``top: N`` beside it."""
        if isinstance(value, str):
            if value in _ON_MERGED_MODELS:
                raise ValueError(
                    f"expected wsc or a variant of it, got {value!r}, which runs on a merged "
                    f"model: `magic-fast methods {value}` says how"
                )
            return {} if value == "wsc" else {"variant": value}
        if not isinstance(value, Mapping):
            return value
        fields = dict(value)
        if isinstance(fields.get("sensitive"), str):
            fields["sensitive"] = {"path": fields["sensitive"]}
            if fields.get("top") is not None:
                fields["sensitive"]["top"] = fields["top"]
            fields.pop("top", None)
        return fields

    @field_validator("clamp")
    @classmethod
    def _clamp_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] <= value[1]:
            raise ValueError(f"expected [low, high] with 0 <= low <= high, got {list(value)}")
        return value

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, named as ``mf.WeightCalibration`` names its arguments.

        ``tensors`` is a word or ``{"include", "exclude"}``; ``sensitive`` is None, a tuple of
        names, or ``{"path", "top"}``, a file that the calibration reads.
        """
        return self.model_dump(mode="python")

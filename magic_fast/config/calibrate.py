"""The ``calibrate:`` block: what to calibrate and how. The mathematics is elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    model_validator,
)
from pydantic_core import PydanticKnownError

from magic_fast.calibration.builtin import ON_MERGED_MODELS
from magic_fast.calibration.registry import is_variant, variants
from magic_fast.calibration.values import default_of, settings_of, words_of
from magic_fast.calibration.weight import WeightCalibration
from magic_fast.config.references import require_file


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


def _tag(plain: str, mapping: str) -> Callable[[Any], str]:
    return lambda value: mapping if isinstance(value, Mapping | BaseModel) else plain


def _power(value: Any) -> Any:
    if value == "inf" or (isinstance(value, float) and value == math.inf):
        return "inf"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"expected a whole number >= 1 or 'inf', got {value!r}")


def _axis(value: Any) -> Any:
    """A whole number, or a list of them as a tuple; or a mapping of patterns to those."""
    if isinstance(value, Mapping):
        return {_regex(pattern): _axis(axes) for pattern, axes in value.items()}
    axes = value if isinstance(value, list | tuple) else [value]
    if value is not None and (not axes or not all(type(axis) is int for axis in axes)):
        raise ValueError(f"expected a whole number or a list of them, got {value!r}")
    return tuple(axes) if isinstance(value, list | tuple) else value


Number = Annotated[float, Field(strict=True)]


def _ordered(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not 0 <= value[0] <= value[1]:
        raise ValueError(f"expected [low, high] with 0 <= low <= high, got {list(value)}")
    return value


def _variant(value: Any) -> str:
    if not is_variant(value):
        *first, last = map(repr, variants())
        expected = f"{', '.join(first)} or {last}"
        raise PydanticKnownError("literal_error", {"expected": expected})
    return str(value)


#: Kind of setting → its type in YAML. That of an enum is its words.
_TYPES: dict[str, Any] = {
    "variant": Annotated[str, BeforeValidator(_variant)],
    "norm": Annotated[int | Literal["inf"], BeforeValidator(_power)],
    "flag": Annotated[bool, Field(strict=True)],
    "bounds": Annotated[tuple[Number, Number] | None, AfterValidator(_ordered)],
    "exponent": Annotated[float, Field(strict=True, ge=0.0)],
    "factor": Number,
    "tensors": Annotated[
        Annotated[Literal["general", "magic"], Tag("<name>")]
        | Annotated[TensorPatterns, Tag("<patterns>")],
        Discriminator(_tag("<name>", "<patterns>")),
    ],
    "tensor names": Annotated[
        Annotated[tuple[str, ...], Tag("<names>")] | Annotated[SensitiveScores, Tag("<scores>")],
        Discriminator(_tag("<names>", "<scores>")),
    ]
    | None,
    "axes": Annotated[
        int | tuple[int, ...] | dict[str, int | tuple[int, ...]] | None, BeforeValidator(_axis)
    ],
}


def _type_of(name: str, kind: Any) -> Any:
    if not isinstance(kind, type):
        return _TYPES[kind]
    words = Literal[words_of(WeightCalibration, name)]  # type: ignore[valid-type]
    return words if default_of(WeightCalibration, name) is not None else words | None


#: The settings of ``mf.WeightCalibration``, each with its default there.
_FIELDS: dict[str, Any] = {
    f.name: (_type_of(f.name, f.metadata["kind"]), default_of(WeightCalibration, f.name))
    for f in settings_of(WeightCalibration)
}
_Settings: Any = create_model("_Settings", __base__=Strict, **_FIELDS)


class CalibrateConfig(_Settings):  # type: ignore[misc]
    """Weight-space calibration (WSC) as the YAML spells it; ``calibrate: wsc`` is all defaults,
    ``calibrate: sphere`` another variant's. The keys are the settings of ``mf.WeightCalibration``;
    ``sensitive`` is a list of names, or a JSON file of scores.

    >>> CalibrateConfig(variant="sphere").as_dict()["p"]
    2
    """

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: Any) -> Any:
        """``wsc`` for the defaults, a variant's name for it; ``sensitive: file.json`` with
        ``top: N`` beside it."""
        if isinstance(value, str):
            if value in ON_MERGED_MODELS:
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

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, named as ``mf.WeightCalibration`` names its arguments.

        ``tensors`` is a word or ``{"include", "exclude"}``; ``sensitive`` is None, a tuple of
        names, or ``{"path", "top"}``, a file that the calibration reads.
        """
        values: dict[str, Any] = self.model_dump(mode="python")
        return values

    def arguments_in(self, folder: Path | None) -> dict[str, Any]:
        """:meth:`as_dict` with the file of scores found, here or in ``folder``.

        Raises:
            ConfigError: the file is in neither place.
        """
        arguments = self.as_dict()
        if isinstance(self.sensitive, SensitiveScores):
            path = require_file(
                self.sensitive.path, folder, key="calibrate.sensitive", what="a JSON file of scores"
            )
            arguments["sensitive"]["path"] = str(path)
        return arguments

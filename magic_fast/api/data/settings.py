"""Methods that take data: their settings, and what they report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from magic_fast.errors import InputError

METHODS = ("regmean", "fisher")


@dataclass
class DataMergeReport:
    """A merge by what samples tell.

    Attributes:
        method: ``regmean`` or ``fisher``.
        positions: matrix → inputs that it was merged by, all experts together; a matrix is a
            parameter, or rows of one, ``name[start:stop]``.
        averaged: parameters that are the experts' mean, because no sample tells of them.
        left: share of the parameters that are.
        warnings: what the caller should know of.
    """

    method: str
    positions: dict[str, int] = field(default_factory=dict)
    averaged: list[str] = field(default_factory=list)
    left: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class DataMethod:
    """A method and its settings, checked.

    Attributes:
        name: ``regmean`` or ``fisher``.
        off_diagonal: of RegMean.
        gradients: Fisher information by gradients; else the mean squares of the inputs.
        draws, seed: of the classes that stand for an expectation.
        normalize: each expert's information by its norm over the model.
        floor: added to the information.
        like_fusion_bench: as that library computes it.
    """

    name: str
    off_diagonal: float = 0.9
    gradients: bool = False
    draws: int = 1
    seed: int = 0
    normalize: bool = True
    floor: float = 1e-6
    like_fusion_bench: bool = False

    @classmethod
    def of(cls, name: str, preset: str | None, **given: Any) -> DataMethod:
        """Refuses what does nothing in the method.

        Raises:
            InputError: an unknown method or preset, a setting of another method, a value out of
                range.
        """
        if name not in METHODS:
            raise InputError(f"method: expected one of {', '.join(METHODS)}, got {name!r}.")
        if preset not in (None, "fusion_bench"):
            raise InputError(f"preset: expected None or 'fusion_bench', got {preset!r}.")
        own = {k: v for k, v in given.items() if v is not None}
        for key in own:
            if (key == "off_diagonal") != (name == "regmean"):
                raise InputError(f"{key} for method {name!r}: expected none, got {own[key]!r}.")
            if key not in ("off_diagonal", "gradients") and not own.get("gradients"):
                raise InputError(
                    f"{key} for method {name!r}: expected none without gradients=True, got "
                    f"{own[key]!r}."
                )
        ours = preset is None
        off = own.setdefault("off_diagonal", 0.9 if ours else 0.1)
        if not 0 <= off <= 1:
            raise InputError(f"off_diagonal for method {name!r}: expected 0 to 1, got {off!r}.")
        if own.get("draws", 1) < 1:
            raise InputError(f"draws for method {name!r}: expected 1 or more, got {own['draws']}.")
        if own.get("floor", 0.0) < 0:
            raise InputError(f"floor for method {name!r}: expected >= 0, got {own['floor']}.")
        if name == "fisher" and not ours and not own.get("gradients"):
            raise InputError(
                "gradients for method 'fisher' under preset 'fusion_bench': expected True, got "
                "none. FusionBench takes gradients."
            )
        return cls(name, like_fusion_bench=not ours, **own)

    @property
    def by_inputs(self) -> bool:
        return self.name == "regmean" or not self.gradients

    @property
    def scale_off_diagonal(self) -> float:
        """Fisher information without gradients is what RegMean's diagonal is."""
        return self.off_diagonal if self.name == "regmean" else 0.0


def left_text(share: float) -> str:
    """What is said of the share that no sample tells of."""
    return f"{share:.1%} of the parameters are the experts' mean: no sample tells of them"

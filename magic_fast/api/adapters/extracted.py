"""What became of fine-tunes that are made adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any


@dataclass(frozen=True)
class ExtractedModule:
    """What became of the change Δ of one module's weight.

    Attributes:
        name: of the module.
        rank: of B·A.
        change: ‖Δ‖_F.
        error: ‖Δ − B·A‖_F ÷ ‖Δ‖_F, of the factors as they are written.
    """

    name: str
    rank: int
    change: float
    error: float


@dataclass
class ExtractedAdapter:
    """One adapter.

    Attributes:
        out: its folder.
        expert: the fine-tune.
        modules: those that changed, in the order of the base.
        saved: tensors that changed and stand in it whole.
        left: tensor that changed and is not in it → ‖Δ‖_F.
        unlike: tensors that only the expert has, and numbers that are no floats and differ: they
            are not in it either.
        warnings: what the user should know.
    """

    out: str
    expert: str
    modules: list[ExtractedModule] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)
    unlike: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """‖expert − merged‖_F ÷ ‖expert − base‖_F, over all tensors that are not saved whole."""
        off = sum((m.error * m.change) ** 2 for m in self.modules)
        total = sum(m.change**2 for m in self.modules)
        rest = sum(norm**2 for norm in self.left.values())
        return sqrt((off + rest) / (total + rest)) if total + rest else 0.0

    @property
    def worst(self) -> list[ExtractedModule]:
        """The five modules of the largest errors."""
        return sorted(self.modules, key=lambda m: -m.error)[:5]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": self.out, "expert": self.expert, "error": self.error,
            "worst": [m.name for m in self.worst], "modules": [vars(m) for m in self.modules],
            "saved": self.saved, "left": self.left, "unlike": self.unlike,
            "warnings": self.warnings,
        }  # fmt: skip

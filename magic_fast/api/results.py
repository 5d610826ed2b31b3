"""What the calls return beside tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class MergeResult:
    """A merge with its decisions (``details=True``). For state dicts every field but ``merged`` is
    a dict by name.

    Attributes:
        merged: the result, as without ``details``.
        keep_masks: K bool masks, or None where nothing was trimmed.
        elected_sign: int8 sign per element, or None without a vote.
        thresholds: K smallest kept magnitudes (0: everything kept).
        keep_probability: K keep probabilities of a random trim (numbers; tensors for DELLA), or
            None.
        rescale_factors: K factors on the kept entries.
        coefficients: raw ξ per row (float32), or None where the tensor is not calibrated.
    """

    merged: Any
    keep_masks: Any = None
    elected_sign: Any = None
    thresholds: Any = None
    keep_probability: Any = None
    rescale_factors: Any = None
    coefficients: Any = None


@dataclass
class TensorCalibration:
    """WSC of one tensor.

    Attributes:
        name, shape: which tensor.
        calibrated: whether the tensor was selected for calibration at all.
        coefficient: raw ξ, float32 [rows] (before side, strength and clamp), or None.
        repaired: rows that the guards left alone.
        magnitude_before, magnitude_after: ‖Δ‖_F ÷ mean_k ‖τ_k‖_F, or None.
    """

    name: str
    shape: tuple[int, ...]
    calibrated: bool
    coefficient: Tensor | None = None
    repaired: int = 0
    magnitude_before: float | None = None
    magnitude_after: float | None = None


@dataclass
class LayerCalibration:
    """FSC of one layer.

    Attributes:
        name: of its module; ``module.in_proj.q`` for a projection of a fused attention.
        tensors: its parameters.
        coefficient: raw ξ, float64 [] or [channels] (before side, strength and clamp), or None.
        applied: what its task vector was multiplied by.
        by_task: raw ξ of each task.
        calls: how often it was called, all batches together.
        positions: how many positions of its output were counted.
        note: why it was left alone; empty where it was not.
    """

    name: str
    tensors: list[str]
    coefficient: Tensor | None
    applied: Tensor
    by_task: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0
    positions: int = 0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: of channels the mean, None where ξ is undefined."""
        c = self.coefficient
        return {
            **vars(self),
            "tensors": list(self.tensors),
            "coefficient": None if c is None else _mean(c),
            "applied": float(self.applied.mean()),
            "by_task": {task: _mean(x) for task, x in self.by_task.items()},
        }


@dataclass
class CalibrationReport:
    """What a calibration did: WSC tensor by tensor, FSC layer by layer."""

    tensors: list[TensorCalibration] = field(default_factory=list)
    layers: list[LayerCalibration] = field(default_factory=list)

    def __getitem__(self, name: str) -> TensorCalibration:
        return {t.name: t for t in self.tensors}[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: means, least and largest coefficients instead of all rows."""
        rows = []
        for t in self.tensors:
            c = t.coefficient
            rows.append(
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "calibrated": t.calibrated,
                    "coefficient_mean": None if c is None else float(c.mean()),
                    "coefficient_min": None if c is None else float(c.min()),
                    "coefficient_max": None if c is None else float(c.max()),
                    "rows_repaired": t.repaired,
                    "magnitude_before": t.magnitude_before,
                    "magnitude_after": t.magnitude_after,
                }
            )
        layers = {"layers": [layer.as_dict() for layer in self.layers]} if self.layers else {}
        return {"tensors": rows, **layers}


@dataclass
class FeatureReport(CalibrationReport):
    """What a calibration in feature space did.

    Attributes:
        left: reason → share of the model's floating parameters that were left alone for it;
            together the whole share that is left. Tied parameters count once.
        warnings: what the caller should know of.
    """

    left: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        more = {"left": dict(self.left), "warnings": list(self.warnings)}
        return super().as_dict() | more


@dataclass
class MergedModule:
    """What became of one module of K adapters.

    Attributes:
        name: as the adapters have it.
        adapters: which of them have it; to the others it has no change.
        ranks: of those.
        rank: of the result; 0 for IA3.
        lost: ‖Δ − B·A‖_F ÷ ‖Δ‖_F, what the result's rank leaves out of the merge.
        calibration: WSC of its weight, where one was asked for.
    """

    name: str
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int
    lost: float = 0.0
    calibration: TensorCalibration | None = None


@dataclass
class AdapterReport:
    """A merge of adapters.

    Attributes:
        out: where the result is.
        kind: ``lora`` or ``ia3``.
        style: ``peft``, ``kohya`` or ``diffusers``.
        method: by which the adapters were merged.
        modules: in the order of the result.
        warnings: what the caller should know of.
    """

    out: str
    kind: str
    style: str
    method: str
    modules: list[MergedModule] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> MergedModule:
        return {module.name: module for module in self.modules}[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        calibrated = [m.calibration for m in self.modules if m.calibration is not None]
        rows = {row["name"]: row for row in CalibrationReport(calibrated).as_dict()["tensors"]}
        modules = []
        for m in self.modules:
            row = None if m.calibration is None else rows[m.calibration.name]
            listed = {"adapters": list(m.adapters), "ranks": list(m.ranks), "calibration": row}
            modules.append({**vars(m), **listed})
        return {**vars(self), "modules": modules, "warnings": list(self.warnings)}


def _mean(x: Tensor) -> float | None:
    """Mean of what is finite."""
    finite = x[x.isfinite()]
    return float(finite.mean()) if finite.numel() else None

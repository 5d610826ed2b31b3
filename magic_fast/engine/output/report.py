"""What a run tells: progress on the way, a report at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magic_fast.engine.output.identity import Identity


#: What a distribution over rows is told by.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def quantiles_of(values: Iterable[float]) -> tuple[float, ...] | None:
    """The values at :data:`QUANTILES` (nearest rank: each is one of ``values``), None without any.

    >>> quantiles_of([4.0, 1.0, 2.0, 3.0, 5.0])
    (1.0, 2.0, 3.0, 4.0, 5.0)
    """
    ordered = sorted(values)
    if not ordered:
        return None
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in QUANTILES)


@dataclass(frozen=True)
class Progress:
    """Bytes read and written so far, of how many, and the tensor just done."""

    done_bytes: int
    total_bytes: int
    tensor: str


@dataclass
class TensorReport:
    """What happened to one tensor.

    Attributes:
        rows: rows that were calibrated, 0 without calibration.
        coefficient_mean, coefficient_min, coefficient_max: of the raw ξ over the rows.
        coefficient_quantiles: of the same, at :data:`QUANTILES`; None where none is finite.
        magnitude_before, magnitude_after: ‖Δ‖_F ÷ mean_k ‖τ_k‖_F; None where not computed.
        rows_repaired: rows that the guards left as merged.
        nonfinite: values of the result that are NaN or infinite; counted where they are allowed.
    """

    name: str
    shape: tuple[int, ...]
    rows: int = 0
    calibrated: bool = False
    coefficient_mean: float | None = None
    coefficient_min: float | None = None
    coefficient_max: float | None = None
    coefficient_quantiles: tuple[float, ...] | None = None
    magnitude_before: float | None = None
    magnitude_after: float | None = None
    rows_repaired: int = 0
    nonfinite: int = 0


@dataclass(frozen=True)
class Written:
    """What an output's record tells of its tensors.

    Attributes:
        identity: of the run.
        checksums: tensor → XXH3-64, hexadecimal.
        nonfinite: tensor → values that are NaN or infinite, where there are any; None where they
            are an error.
    """

    identity: Identity
    checksums: Mapping[str, str]
    nonfinite: Mapping[str, int] | None


@dataclass
class MergeReport:
    """What a merge of checkpoints did.

    Attributes:
        seconds: wall time.
        bytes_read, bytes_written: of tensors.
        peak_memory_bytes: largest resident set of the process.
        stages: seconds that reading, computing and writing were busy; they overlap.
        layers: what calibration in feature space found of each layer, as plain values.
        left: reason → share of the model's floating parameters that it left alone for it.
    """

    out: str
    method: str
    backend: str
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    tensors: list[TensorReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

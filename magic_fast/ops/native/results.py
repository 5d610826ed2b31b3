"""What calibration says of the rows of a tensor, as the native core leaves it."""

from __future__ import annotations

from array import array
from typing import Any

from magic_fast.ops.job import magnitudes_of


class RowResults:
    """What calibration says of the rows of one tensor, filled in by the native core.

    Attributes:
        coefficient: raw ξ, float32 [rows].
        repaired: 1 where the guards left the row alone, [rows].
        norms2: float64 [K + 2], see ``Stats.extra``.
    """

    def __init__(self, rows: int, num_experts: int) -> None:
        self.coefficient = array("f", bytes(4 * rows))
        self.repaired = array("B", bytes(rows))
        self.norms2 = array("d", bytes(8 * (num_experts + 2)))

    @property
    def addresses(self) -> tuple[int, int, int]:
        return (
            self.coefficient.buffer_info()[0],
            self.repaired.buffer_info()[0],
            self.norms2.buffer_info()[0],
        )

    def extra(self) -> dict[str, Any]:
        """``Stats.extra``."""
        before, after = magnitudes_of(self.norms2)
        found = {"repaired": self.repaired, "norms2": self.norms2}
        return {**found, "magnitude_before": before, "magnitude_after": after}

"""What the calls on tensors take beside models, method and parameters: one list of options, each
with its default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from magic_fast.calibration import WeightCalibration
from magic_fast.calibration.weight import RowAxis
from magic_fast.errors import InputError
from magic_fast.models.choice import EVERYTHING, TensorChoice

Calibrate: TypeAlias = str | WeightCalibration | Mapping[str, object] | None
Masks: TypeAlias = Sequence[Tensor | None] | Sequence[Mapping[str, Tensor] | None]
Words: TypeAlias = str | Sequence[str]
Weights: TypeAlias = float | Sequence[float] | Tensor | None


@dataclass(frozen=True)
class MergeOptions:
    """How a merge of tensors runs. The public calls take each by its name, with the default that
    stands here; :func:`magic_fast.merge` describes them.

    >>> MergeOptions(backend="torch").nonfinite
    'error'
    """

    calibrate: Calibrate = None
    preset: str | None = None
    backend: str | None = None
    nonfinite: str = "error"
    row_axis: RowAxis | None = None
    masks: Masks | None = None
    name: str = ""
    seed: int | None = None
    compat: str | None = None
    details: bool = False
    choice: TensorChoice = EVERYTHING

    @property
    def chosen_backend(self) -> str | None:
        """The backend to use: only ``torch`` keeps the details of a merge.

        Raises:
            InputError: details of another backend.
        """
        if not self.details:
            return self.backend
        if self.backend not in (None, "auto", "torch"):
            raise InputError(
                f"details with backend {self.backend!r}: expected backend 'torch', which keeps "
                f"masks and votes, got {self.backend!r}. Leave the backend out."
            )
        return "torch"

"""How much of the samples a calibration or a measurement runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How much of the data is used.

    Attributes:
        samples: of each task, the first ones.
        batch_size: samples that pass through a layer together.
        max_length: tokens of a sample; the rest is cut off.
    """

    samples: int = 64
    batch_size: int = 8
    max_length: int = 512

"""The element-wise merge in plain PyTorch, stage by stage: the specification in code.

First *decide* (float32, as docs/methods.md defines every mask, vote and winner), then *combine*
(float32; float64 when it serves as the oracle, with the same decisions).
"""

from magic_fast.reference.combine import (
    LEAST_DISTANCE,
    Decisions,
    combine,
    decision_dtype,
    task_vectors,
)
from magic_fast.reference.decide import decide, factors, raw_signs, select

__all__ = [
    "LEAST_DISTANCE",
    "Decisions",
    "combine",
    "decide",
    "decision_dtype",
    "factors",
    "raw_signs",
    "select",
    "task_vectors",
]

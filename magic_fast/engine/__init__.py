"""Merging checkpoints on disk: plan, run, report."""

from magic_fast.engine.plan import Input, MergePlan, Step, common_shape, place
from magic_fast.engine.report import (
    QUANTILES,
    MergeReport,
    Progress,
    TensorReport,
    Written,
    quantiles_of,
)
from magic_fast.engine.run import run

__all__ = [
    "QUANTILES",
    "Input",
    "MergePlan",
    "MergeReport",
    "Progress",
    "Step",
    "TensorReport",
    "Written",
    "common_shape",
    "place",
    "quantiles_of",
    "run",
]

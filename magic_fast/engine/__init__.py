"""Merging checkpoints on disk: plan, run, report."""

from magic_fast.engine.output.report import (
    QUANTILES,
    MergeReport,
    Progress,
    TensorReport,
    Written,
    quantiles_of,
)
from magic_fast.engine.plan.plan import MergePlan, place
from magic_fast.engine.plan.step import Input, Step, common_shape
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

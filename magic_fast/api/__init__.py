"""The public calls. Their names are a promise; see ``magic_fast.__all__``."""

from magic_fast.api.calibrate import calibrate_weights
from magic_fast.api.checkpoints import (
    calibrate_checkpoints,
    inspect_checkpoints,
    merge_checkpoints,
    plan_checkpoints,
)
from magic_fast.api.merge import merge, merge_task_vectors
from magic_fast.api.results import CalibrationReport, MergeResult, TensorCalibration
from magic_fast.api.stats import (
    TensorStatistics,
    kth_magnitude,
    row_norms,
    row_stats,
    select,
    task_vector_stats,
)
from magic_fast.api.trim import trim
from magic_fast.engine import MergePlan, MergeReport, Progress, TensorReport
from magic_fast.ops import backends

__all__ = [
    "CalibrationReport",
    "MergePlan",
    "MergeReport",
    "MergeResult",
    "Progress",
    "TensorCalibration",
    "TensorReport",
    "TensorStatistics",
    "backends",
    "calibrate_checkpoints",
    "calibrate_weights",
    "inspect_checkpoints",
    "kth_magnitude",
    "merge",
    "merge_checkpoints",
    "merge_task_vectors",
    "plan_checkpoints",
    "row_norms",
    "row_stats",
    "select",
    "task_vector_stats",
    "trim",
]

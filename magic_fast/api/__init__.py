"""The public calls. Their names are a promise; see ``magic_fast.__all__``."""

from magic_fast.api.calibrate import calibrate_weights
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
from magic_fast.ops import backends

__all__ = [
    "CalibrationReport",
    "MergeResult",
    "TensorCalibration",
    "TensorStatistics",
    "backends",
    "calibrate_weights",
    "kth_magnitude",
    "merge",
    "merge_task_vectors",
    "row_norms",
    "row_stats",
    "select",
    "task_vector_stats",
    "trim",
]

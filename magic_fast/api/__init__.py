"""The public calls. Their names are a promise; see ``magic_fast.__all__``.

Each name is looked up on first use, so that merging checkpoints never loads what only the calls on
tensors need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from magic_fast.api.calibrate import calibrate_weights
    from magic_fast.api.calibrating_checkpoints import calibrate_checkpoints
    from magic_fast.api.checkpoints import merge_checkpoints, plan_checkpoints
    from magic_fast.api.features import calibrate_features
    from magic_fast.api.inspecting import inspect_checkpoints
    from magic_fast.api.masks import EmrModels, consensus_mask, emr, task_masks
    from magic_fast.api.merging import merge, merge_task_vectors
    from magic_fast.api.merging_adapters import merge_adapters
    from magic_fast.api.merging_into import merge_into
    from magic_fast.api.results import (
        AdapterReport,
        CalibrationReport,
        LayerCalibration,
        MergedModule,
        MergeResult,
        TensorCalibration,
    )
    from magic_fast.api.sensitivity import sensitive_layers
    from magic_fast.api.sensitivity_checkpoints import sensitive_layers_of_checkpoints
    from magic_fast.api.series import merge_series
    from magic_fast.api.spectrum import lines, svc
    from magic_fast.api.stats import (
        TensorStatistics,
        kth_magnitude,
        row_norms,
        row_stats,
        select,
        task_vector_stats,
    )
    from magic_fast.api.sweeping import sweep
    from magic_fast.api.sweeping_checkpoints import SweepReport, sweep_checkpoints
    from magic_fast.api.trimming import trim
    from magic_fast.engine import MergePlan, MergeReport, Progress, TensorReport
    from magic_fast.engine.output.verify import VerifyReport, verify_checkpoint
    from magic_fast.ops import backends

_HOMES = {
    "magic_fast.api.calibrate": ("calibrate_weights",),
    "magic_fast.api.features": ("calibrate_features",),
    "magic_fast.api.calibrating_checkpoints": ("calibrate_checkpoints",),
    "magic_fast.api.checkpoints": ("merge_checkpoints", "plan_checkpoints"),
    "magic_fast.api.inspecting": ("inspect_checkpoints",),
    "magic_fast.api.masks": ("EmrModels", "consensus_mask", "emr", "task_masks"),
    "magic_fast.api.merging": ("merge", "merge_task_vectors"),
    "magic_fast.api.merging_adapters": ("merge_adapters",),
    "magic_fast.api.merging_into": ("merge_into",),
    "magic_fast.api.results": (
        "AdapterReport",
        "CalibrationReport",
        "LayerCalibration",
        "MergedModule",
        "MergeResult",
        "TensorCalibration",
    ),
    "magic_fast.api.series": ("merge_series",),
    "magic_fast.api.sensitivity": ("sensitive_layers",),
    "magic_fast.api.sensitivity_checkpoints": ("sensitive_layers_of_checkpoints",),
    "magic_fast.api.spectrum": ("lines", "svc"),
    "magic_fast.api.stats": (
        "TensorStatistics",
        "kth_magnitude",
        "row_norms",
        "row_stats",
        "select",
        "task_vector_stats",
    ),
    "magic_fast.api.sweeping": ("sweep",),
    "magic_fast.api.sweeping_checkpoints": ("SweepReport", "sweep_checkpoints"),
    "magic_fast.api.trimming": ("trim",),
    "magic_fast.engine.output.verify": ("VerifyReport", "verify_checkpoint"),
    "magic_fast.engine": ("MergePlan", "MergeReport", "Progress", "TensorReport"),
    "magic_fast.ops": ("backends",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterReport",
    "CalibrationReport",
    "EmrModels",
    "LayerCalibration",
    "MergePlan",
    "MergeReport",
    "MergeResult",
    "MergedModule",
    "Progress",
    "SweepReport",
    "TensorCalibration",
    "TensorReport",
    "TensorStatistics",
    "VerifyReport",
    "backends",
    "calibrate_checkpoints",
    "calibrate_features",
    "calibrate_weights",
    "consensus_mask",
    "emr",
    "inspect_checkpoints",
    "kth_magnitude",
    "lines",
    "merge",
    "merge_adapters",
    "merge_checkpoints",
    "merge_into",
    "merge_series",
    "merge_task_vectors",
    "plan_checkpoints",
    "row_norms",
    "row_stats",
    "select",
    "sensitive_layers",
    "sensitive_layers_of_checkpoints",
    "svc",
    "sweep",
    "sweep_checkpoints",
    "task_masks",
    "task_vector_stats",
    "trim",
    "verify_checkpoint",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value

"""Merges fine-tuned checkpoints of one base model and restores each layer's magnitude.

>>> import magic_fast as mf
>>> import torch
>>> base = torch.zeros(2, 4)
>>> experts = [torch.full((2, 4), 1.0), torch.full((2, 4), 3.0)]
>>> mf.merge(base, experts, "average").unique().tolist()
[2.0]

What stands in ``__all__`` is the public surface; everything else may change. Importing this package
imports no other: each name is looked up in its room on first use.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from magic_fast._version import __version__

if TYPE_CHECKING:
    from magic_fast.api import (
        AdapterReport,
        CalibrationReport,
        MergeReport,
        MergeResult,
        SweepReport,
        backends,
        calibrate_checkpoints,
        calibrate_weights,
        consensus_mask,
        emr,
        inspect_checkpoints,
        kth_magnitude,
        lines,
        merge_adapters,
        merge_checkpoints,
        merge_into,
        merge_series,
        merge_task_vectors,
        plan_checkpoints,
        row_norms,
        row_stats,
        select,
        sensitive_layers,
        sensitive_layers_of_checkpoints,
        svc,
        sweep,
        sweep_checkpoints,
        task_masks,
        task_vector_stats,
        verify_checkpoint,
    )

    # Functions named as their modules: from these, mypy takes the function for sure.
    from magic_fast.api.features import calibrate_features
    from magic_fast.api.merging import merge
    from magic_fast.api.trimming import trim
    from magic_fast.calibration import (
        SensitivityReport,
        TensorFilter,
        WeightCalibration,
        sensitive_from_file,
    )
    from magic_fast.config import MergeConfig
    from magic_fast.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        InputError,
        InternalError,
        MagicFastError,
        NonFiniteError,
        OutputError,
    )

# room → the public names it brings
_ROOMS: dict[str, tuple[str, ...]] = {
    "magic_fast.api": (
        "AdapterReport",
        "CalibrationReport",
        "MergeReport",
        "MergeResult",
        "SweepReport",
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
    ),
    "magic_fast.calibration": (
        "SensitivityReport",
        "TensorFilter",
        "WeightCalibration",
        "sensitive_from_file",
    ),
    "magic_fast.config": ("MergeConfig",),
    "magic_fast.errors": (
        "BackendError",
        "CheckpointError",
        "ConfigError",
        "InputError",
        "InternalError",
        "MagicFastError",
        "NonFiniteError",
        "OutputError",
    ),
}

# A library is silent until its user asks for its log.
logging.getLogger("magic_fast").addHandler(logging.NullHandler())

_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [  # noqa: RUF022 - ordered by use
    "merge",
    "merge_into",
    "merge_task_vectors",
    "sweep",
    "trim",
    "calibrate_weights",
    "calibrate_features",
    "sensitive_layers",
    "sensitive_from_file",
    "svc",
    "lines",
    "task_vector_stats",
    "task_masks",
    "consensus_mask",
    "emr",
    "merge_checkpoints",
    "merge_series",
    "merge_adapters",
    "sweep_checkpoints",
    "calibrate_checkpoints",
    "sensitive_layers_of_checkpoints",
    "inspect_checkpoints",
    "plan_checkpoints",
    "verify_checkpoint",
    "backends",
    "row_stats",
    "select",
    "kth_magnitude",
    "row_norms",
    "MergeConfig",
    "TensorFilter",
    "WeightCalibration",
    "MergeResult",
    "MergeReport",
    "SweepReport",
    "AdapterReport",
    "CalibrationReport",
    "SensitivityReport",
    "MagicFastError",
    "InputError",
    "ConfigError",
    "CheckpointError",
    "NonFiniteError",
    "BackendError",
    "OutputError",
    "InternalError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "integrations":  # mf.integrations.mergekit and kin, each imported on use
        return import_module("magic_fast.integrations")
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'magic_fast' has no attribute {name!r}")
    value = getattr(import_module(room), name)
    globals()[name] = value  # the next look-up is a plain one
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

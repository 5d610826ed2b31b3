"""Calibration of merged magnitudes: which tensors, which rows, how much."""

from magic_fast.calibration.weight import (
    TensorFilter,
    WeightCalibration,
    as_calibration,
    sensitive_from_file,
)

__all__ = ["TensorFilter", "WeightCalibration", "as_calibration", "sensitive_from_file"]

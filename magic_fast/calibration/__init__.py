"""Calibration of merged magnitudes: which tensors, which rows, how much."""

from magic_fast.calibration.sensitivity.lists import SensitivityReport, sensitive_from_file
from magic_fast.calibration.tensors import TensorFilter
from magic_fast.calibration.weight import WeightCalibration, as_calibration

__all__ = [
    "SensitivityReport",
    "TensorFilter",
    "WeightCalibration",
    "as_calibration",
    "sensitive_from_file",
]

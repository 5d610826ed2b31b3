"""What a user gets wrong, and the words that say so: what, where, expected, got, advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.errors import BackendError, InputError, NonFiniteError

_NAME = "model.layers.0.mlp.up_proj.weight"


def experts(k: int = 2, shape: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    return [torch.full(shape, float(i + 1)) for i in range(k)]


def base(shape: tuple[int, ...] = (2, 3)) -> Tensor:
    return torch.zeros(shape)


def states(k: int = 2) -> list[dict[str, Tensor]]:
    return [{_NAME: t, "norm.weight": t[0].clone()} for t in experts(k)]


def _with(tensor: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    tensor[index] = value
    return tensor


Call = Callable[[], Any]


def merging(*args: Any, **kwargs: Any) -> Call:
    return lambda: mf.merge(*args, **kwargs)


def merging_task_vectors(*args: Any, **kwargs: Any) -> Call:
    return lambda: mf.merge_task_vectors(*args, **kwargs)


def calibrating(*args: Any, **kwargs: Any) -> Call:
    return lambda: mf.calibrate_weights(*args, **kwargs)


#: word → (call, error class, the message's beginning)
CASES: dict[str, tuple[Call, type[Exception], str]] = {
    # names and shapes
    "shape_of_a_bare_tensor": (
        merging(base(), [experts()[0], torch.ones(3, 2)]),
        InputError,
        "shape of expert 1 for the tensor: expected (2, 3) as in base, got (3, 2). "
        "All models must have the same architecture.",
    ),
    "shape_in_a_state_dict": (
        merging_task_vectors([states()[0], {**states()[1], _NAME: torch.ones(2, 4)}]),
        InputError,
        f"shape of expert 1 for '{_NAME}': expected (2, 3) as in expert 0, got (2, 4).",
    ),
    "tensor_missing_in_an_expert": (
        merging(states()[0], [states()[0], {_NAME: torch.ones(2, 3)}]),
        InputError,
        "tensor 'norm.weight' in experts[1]: expected one as in base, got none.",
    ),
    "tensor_missing_in_the_base": (
        merging({_NAME: torch.ones(2, 3)}, states()),
        InputError,
        "tensor 'norm.weight' in base: expected one as in experts[0], got none.",
    ),
    "tensor_beside_state_dicts": (
        merging(base(), states()),
        InputError,
        "experts[0]: expected a tensor like base, got a state dict.",
    ),
    "not_a_tensor_at_all": (
        merging(base(), [[1.0, 2.0]]),
        InputError,
        "experts[0]: expected a torch.Tensor, a state dict or a module, got list.",
    ),
    "value_that_is_no_tensor": (
        merging({"w": 3.0}, [{"w": torch.ones(1)}]),
        InputError,
        "base['w']: expected a torch.Tensor, got float.",
    ),
    "experts_not_a_list": (
        merging(base(), {"a": base()}),
        InputError,
        "experts: expected a list of tensors or of state dicts, or a mapping of named models, got "
        "dict.",
    ),
    "stacked_scalar": (
        merging_task_vectors(torch.tensor(1.0)),
        InputError,
        "task_vectors: expected a list or a stacked [K, …] tensor, got a 0-d tensor.",
    ),
    "no_experts": (merging(base(), []), InputError, "experts: expected at least one, got none."),
    "no_task_vectors": (
        merging_task_vectors([]),
        InputError,
        "task_vectors: expected at least one, got none.",
    ),
    # dtypes
    "integer_expert": (
        merging(base(), [base(), torch.ones(2, 3, dtype=torch.int32)]),
        InputError,
        "dtype of expert 1 for the tensor: expected float64, float32, float16 or bfloat16, "
        "got torch.int32. Integer tensors are not merged; they must agree and are copied.",
    ),
    "integer_tensors_disagree": (
        merging_task_vectors([{"ids": torch.tensor([1, 2])}, {"ids": torch.tensor([1, 3])}]),
        InputError,
        "integer tensor 'ids' in experts[1]: expected the values of experts[0], got others. "
        "Integer tensors are not merged; they must agree.",
    ),
    "complex": (
        merging_task_vectors([{"z": torch.ones(2, dtype=torch.complex64)}]),
        InputError,
        "dtype of 'z': expected a real dtype, got torch.complex64.",
    ),
    # parameters
    "density_zero": (
        merging(base(), experts(), density=0),
        InputError,
        "density for method 'ties': expected a finite number in (0, 1] "
        "(a fraction, never a percent: 0.5 keeps half), got 0.",
    ),
    "density_above_one": (
        merging(base(), experts(), density=1.5),
        InputError,
        "density for method 'ties': expected a finite number in (0, 1] "
        "(a fraction, never a percent: 0.5 keeps half), got 1.5.",
    ),
    "density_negative": (
        merging(base(), experts(), density=-1),
        InputError,
        "density for method 'ties': expected a finite number in (0, 1]",
    ),
    "density_in_percent": (
        merging(base(), experts(), density=20),
        InputError,
        "density for method 'ties': expected a finite number in (0, 1] "
        "(a fraction, never a percent: 0.5 keeps half), got 20.",
    ),
    "density_of_one_expert": (
        merging(base(), experts(), density=[0.5, 1.5]),
        InputError,
        "density of expert 1 for method 'ties': expected a finite number in (0, 1]",
    ),
    "density_nan": (
        merging(base(), experts(), density=math.nan),
        InputError,
        "density for method 'ties': expected a finite number in (0, 1]",
    ),
    "densities_count": (
        merging(base(), experts(), density=[0.5, 0.5, 0.5]),
        InputError,
        "density: expected one number or one per expert (2), got 3.",
    ),
    "density_of_a_trim": (
        lambda: mf.trim(base(), "magnitude", 20),
        InputError,
        "density of expert 0: expected a fraction in (0, 1], got 20.0. "
        "It is the kept fraction, never a percentage.",
    ),
    "epsilon_too_wide": (
        merging(base(), experts(), "della", density=0.9, epsilon=0.2),
        InputError,
        "epsilon of expert 0: expected 0 < density − epsilon and density + epsilon < 1, "
        "got density 0.9 and epsilon 0.2.",
    ),
    "weights_count": (
        merging(base(), experts(), weights=[1.0, 2.0, 3.0]),
        InputError,
        "weights: expected one number or one per expert (2), got 3.",
    ),
    "weight_not_finite": (
        merging(base(), experts(), weights=[1.0, math.inf]),
        InputError,
        "weights of expert 1 for method 'ties': expected a finite number, got inf.",
    ),
    "scale_not_finite": (
        merging(base(), experts(), scale=math.nan),
        InputError,
        "scale for method 'ties': expected a finite number, got nan.",
    ),
    "unknown_method": (
        merging(base(), experts(), "tie"),
        InputError,
        "method 'tie': expected one of ",
    ),
    "unknown_parameter": (
        merging(base(), experts(), densty=0.5),
        InputError,
        "parameter 'densty' for method 'ties': expected one of ",
    ),
    "parameter_of_another_method": (
        merging(base(), experts(), "task_arithmetic", density=0.5),
        InputError,
        "parameter 'density' for method 'task_arithmetic': expected one of ",
    ),
    "required_parameter": (
        merging(base(), experts(1), "slerp"),
        InputError,
        "parameter 't' for method 'slerp': expected a finite number in [0, 1], got none.",
    ),
    "unknown_preset": (
        merging(base(), experts(), preset="mergkit"),
        InputError,
        "preset 'mergkit': expected one of 'default', 'mergekit', ",
    ),
    "method_not_of_the_preset": (
        merging(base(), experts(), "breadcrumbs", preset="magic"),
        InputError,
        "method 'breadcrumbs' under preset 'magic': expected one of ",
    ),
    "unknown_compat": (
        merging(base(), experts(), "breadcrumbs", compat="mergekit-0.2"),
        InputError,
        "compat 'mergekit-0.2': expected one of mergekit-0.1.4.",
    ),
    "seed_without_chance": (
        merging(base(), experts(), "ties", seed=1),
        InputError,
        "seed for method 'ties': expected none, got 1. Nothing in it is random.",
    ),
    "nonfinite_word": (
        merging(base(), experts(), nonfinite="ignore"),
        InputError,
        "nonfinite: expected 'error' or 'propagate', got 'ignore'.",
    ),
    # base
    "base_required": (
        merging(None, experts()),
        InputError,
        "base for method 'ties': expected a tensor or a state dict, got None. "
        "Use merge_task_vectors() where the experts are task vectors already.",
    ),
    "base_refused": (
        merging(base(), experts(), "linear"),
        InputError,
        "base for method 'linear': expected None, got a model. This method works on whole models: "
        "pass base=None and the base among the experts.",
    ),
    "calibration_without_base": (
        merging(None, experts(), "linear", calibrate="wsc"),
        InputError,
        "calibrate for method 'linear' without a base: expected None, got a calibration. "
        "Calibration compares task vectors, so it needs the base.",
    ),
    # masks
    "masks_without_chance": (
        merging(base(), experts(), masks=[None, None]),
        InputError,
        "masks for method 'ties': expected none, got some.",
    ),
    "masks_count": (
        merging(base(), experts(), "dare_ties", masks=[torch.ones(2, 3).bool()]),
        InputError,
        "keep mask for the tensor: expected one per expert (2), got 1.",
    ),
    "mask_dtype": (
        merging(base(), experts(), "dare_ties", masks=[torch.ones(2, 3), None]),
        InputError,
        "keep mask of expert 0 for the tensor: expected bool or uint8, got torch.float32.",
    ),
    "mask_shape": (
        merging(base(), experts(), "dare_ties", masks=[None, torch.ones(3, 2).bool()]),
        InputError,
        "keep mask of expert 1 for the tensor: expected shape (2, 3), got (3, 2).",
    ),
    # out
    "out_shape": (
        merging(base(), experts(), out=torch.empty(3, 2)),
        InputError,
        "out for the tensor: expected shape (2, 3), got (3, 2).",
    ),
    "out_dtype": (
        merging(base(), experts(), out=torch.empty(2, 3, dtype=torch.int8)),
        InputError,
        "out for the tensor: expected a floating dtype, got torch.int8.",
    ),
    "out_of_another_kind": (
        merging(base(), experts(), out={}),
        InputError,
        "out: expected a tensor like the inputs, got dict.",
    ),
    "out_without_a_tensor": (
        merging_task_vectors(states(), out={_NAME: torch.empty(2, 3)}),
        InputError,
        "out: expected a dict with a tensor for 'norm.weight', got none.",
    ),
    # what is not finite
    "nan_in_an_expert": (
        merging(base(), [experts()[0], _with(experts()[1], (1, 0), math.nan)], name=_NAME),
        NonFiniteError,
        f"NaN or infinity in expert 1 for '{_NAME}': expected finite values, got one at flat index "
        "3. Repair the checkpoint, or pass nonfinite='propagate' to let it through.",
    ),
    "infinity_in_the_base": (
        merging(_with(base(), (0, 2), -math.inf), experts()),
        NonFiniteError,
        "NaN or infinity in the base for the tensor: expected finite values, got one at flat "
        "index 2.",
    ),
    "nan_in_a_state_dict": (
        merging_task_vectors(
            [states()[0], {**states()[1], "norm.weight": torch.full((3,), math.nan)}]
        ),
        NonFiniteError,
        "NaN or infinity in expert 1 for 'norm.weight': expected finite values, got one at flat "
        "index 0.",
    ),
    "nan_in_the_merged_model": (
        calibrating(base(), experts(), _with(base(), (0, 1), math.nan)),
        NonFiniteError,
        "NaN or infinity in the merged model for the tensor: expected finite values, got one at "
        "flat index 1.",
    ),
    "overflow": (
        merging(None, [torch.tensor([1.0, 7e4])], "linear", out=torch.empty(2).half(), name="w"),
        NonFiniteError,
        "result for 'w': expected values within F16, got an overflow at flat index 1. "
        "Use a wider output dtype, or pass nonfinite='propagate'.",
    ),
    # calibration
    "unknown_sensitive_name": (
        merging_task_vectors(
            states(), "average", calibrate=mf.WeightCalibration(sensitive=(_NAME, "no.such"))
        ),
        InputError,
        "sensitive tensor 'no.such': expected a tensor of the model, got an unknown name.",
    ),
    "sensitive_is_a_string": (
        lambda: mf.WeightCalibration(sensitive="layers.json"),  # type: ignore[arg-type]
        InputError,
        "calibration sensitive: expected a list of tensor names, got the string 'layers.json'.",
    ),
    "calibration_word": (
        merging(base(), experts(), calibrate="fsc"),
        InputError,
        "calibrate: expected None, 'wsc', 'manifold', 'manifold_exact', 'sphere', 'spectral' or a "
        "WeightCalibration, got 'fsc'.",
    ),
    "calibration_key": (
        merging(base(), experts(), calibrate={"varient": "sphere"}),
        InputError,
        "calibration 'varient': expected one of ",
    ),
    "calibration_variant": (
        lambda: mf.WeightCalibration(variant="round"),  # type: ignore[arg-type]
        InputError,
        "calibration variant: expected one of 'manifold', 'manifold_exact', 'sphere', 'spectral', "
        "got 'round'.",
    ),
    "calibration_p": (
        lambda: mf.WeightCalibration(variant="sphere", p=0.5),  # type: ignore[arg-type]
        InputError,
        "calibration p: expected an integer >= 1 or 'inf', got 0.5.",
    ),
    "calibration_p_word": (
        lambda: mf.WeightCalibration(variant="sphere", p="two"),  # type: ignore[arg-type]
        InputError,
        "calibration p: expected an integer >= 1 or 'inf', got 'two'.",
    ),
    "calibration_clamp": (
        lambda: mf.WeightCalibration(clamp=(10.0, 0.1)),
        InputError,
        "calibration clamp: expected (low, high) with 0 <= low <= high, got (10.0, 0.1).",
    ),
    "calibration_clamp_number": (
        lambda: mf.WeightCalibration(clamp=2.0),  # type: ignore[arg-type]
        InputError,
        "calibration clamp: expected (low, high) with 0 <= low <= high, got 2.0.",
    ),
    "calibration_strength": (
        lambda: mf.WeightCalibration(strength=math.nan),
        InputError,
        "calibration strength: expected a finite number, got nan.",
    ),
    "calibration_pattern": (
        lambda: mf.WeightCalibration(tensors="all"),
        InputError,
        "calibration tensors: expected 'general', 'magic' or a TensorFilter, got 'all'.",
    ),
    "row_axis": (
        merging(base(), experts(), calibrate="wsc", row_axis=2, name="w"),
        InputError,
        "row_axis for w: expected an axis of a 2-dimensional tensor, got 2.",
    ),
    # backends
    "unknown_backend": (
        merging(base(), experts(), backend="vulkan"),
        BackendError,
        "backend 'vulkan': expected one of 'native', 'cuda', 'triton', 'torch'",
    ),
    # trims
    "trim_rule": (
        lambda: mf.trim(base(), "top", 0.5),
        InputError,
        "rule: expected one of magnitude, ",
    ),
    "trim_side": (
        lambda: mf.trim(base(), "magnitude", 0.5, side="top"),
        InputError,
        "side: expected 'largest' or 'smallest', got 'top'.",
    ),
    "trim_integers": (
        lambda: mf.trim(torch.ones(3, dtype=torch.int64), "magnitude", 0.5),
        InputError,
        "x: expected a floating tensor, got torch.int64.",
    ),
    "trim_rescale": (
        lambda: mf.trim(base(), "magnitude", 0.5, rescale="l3"),
        InputError,
        "rescale: expected None or one of ",
    ),
    "trim_mask_shape": (
        lambda: mf.trim(base(), "random", 0.5, mask=torch.ones(7).bool()),
        InputError,
        "mask: expected shape (2, 3), got (7,).",
    ),
    "trim_relative_shape": (
        lambda: mf.trim(base(), "magnitude", 0.5, relative_to=torch.ones(7)),
        InputError,
        "relative_to: expected shape (2, 3), got (7,).",
    ),
    "kth_magnitude": (
        lambda: mf.kth_magnitude(torch.ones(3), 4),
        InputError,
        "k: expected 1 to 3 (the number of elements), got 4.",
    ),
}

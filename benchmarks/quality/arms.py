"""The arms: a merge, then a calibration or a control, all through the public interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import magic_fast as mf
from quality.problem import Problem, State, moved, own_scale
from quality.settings import CLAMPED, CLAMPS, DRAW_SIZE, DRAWN, DRAWS, MASKS, Scenario

#: The package's defaults.
MERGES = (
    "average", "task_arithmetic", "ties", "dare_ties", "consensus_ta", "tsv_m", "iso_c", "iso_cts",
)  # fmt: skip
#: λ of an uncalibrated merge that nothing was tuned for, where it is not 1.
USUAL_SCALE = {"task_arithmetic": 0.3}
RANDOM = ("dare_ties",)

CLAMP = (0.1, 10.0)  # the package's default
#: name → settings of the calibrations.
WEIGHT: dict[str, dict[str, Any]] = {
    "WSC manifold": {"variant": "manifold"},
    "WSC sphere": {"variant": "sphere"},
}
FEATURE: dict[str, dict[str, Any]] = {
    "FSC": {},
    "FSC sequential": {"sequential": True},
    "DSC": {"space": "dual"},
    "DSC sphere": {"space": "dual", "weight_calibration": {"variant": "sphere"}},
}
CALIBRATIONS = (*WEIGHT, *FEATURE)
TENSOR = "one scalar per tensor"
SCALAR = "one scalar"
PERMUTED = {"manifold permuted": "manifold", "sphere permuted": "sphere"}
CONTROLS = (SCALAR, TENSOR, *PERMUTED)
ABSOLUTE = "manifold, absolute ε"
DATA_OF = {name: "unlabelled" if name in FEATURE else "none" for name in (*CALIBRATIONS, *CONTROLS)}


@dataclass(frozen=True)
class Arm:
    """What a row of the results is of.

    Attributes:
        role: ``main``, or what is varied: ``mask``, ``draw``, ``clamp``.
    """

    merge: str
    calibration: str
    mask: int = 0
    draw: int = 0
    clamp: str = ""
    role: str = "main"


def weight_calibrated(problem: Problem, merged: State, clamp: Any = CLAMP, **how: Any) -> State:
    settings = {"clamp": clamp, **how}
    return mf.calibrate_weights(
        problem.start, problem.experts, merged, calibration=settings
    )[0]  # fmt: skip


def feature_calibrated(
    problem: Problem, merged: State, draw: int, clamp: Any = CLAMP, **how: Any
) -> State:
    if how.get("space") == "dual":
        inner = how.get("weight_calibration", {"variant": "manifold"})
        how = {**how, "weight_calibration": {**inner, "clamp": clamp}}
    found, _ = mf.calibrate_features(
        problem.start,
        dict(zip(problem.names, problem.experts, strict=True)),
        merged,
        problem.samples("calibration", DRAW_SIZE, draw),
        model=problem.base,
        clamp=clamp,
        **how,
    )
    return found


def permuted_rows(problem: Problem, merged: State, variant: str, seed: int) -> State:
    """ξ of WSC, applied to other rows of the same tensor."""
    _, report = mf.calibrate_weights(
        problem.start, problem.experts, merged, calibration={"variant": variant}
    )
    generator = torch.Generator().manual_seed(seed)
    result = dict(merged)
    for tensor in report.tensors:
        if tensor.coefficient is None:
            continue
        factor = tensor.coefficient.nan_to_num(1.0).clamp(*CLAMP)
        factor = factor[torch.randperm(len(factor), generator=generator)]
        start, end = problem.start[tensor.name], merged[tensor.name]
        result[tensor.name] = start + factor.view(-1, *[1] * (end.dim() - 1)) * (end - start)
    return result


def calibrated(problem: Problem, merged: State, arm: Arm) -> State:
    clamp = CLAMPS[arm.clamp] if arm.clamp else CLAMP
    name = arm.calibration
    if name == "none":
        return merged
    if name in WEIGHT:
        return weight_calibrated(problem, merged, clamp, **WEIGHT[name])
    if name in FEATURE:
        return feature_calibrated(problem, merged, arm.draw, clamp, **FEATURE[name])
    if name == SCALAR:
        start = problem.start
        return moved(start, merged, own_scale(start, problem.experts, merged))
    if name == TENSOR:
        return weight_calibrated(problem, merged, variant="sphere", granularity="tensor")
    if name == ABSOLUTE:
        return weight_calibrated(problem, merged, eps_mode="absolute")
    return permuted_rows(problem, merged, PERMUTED[name], seed=0)


def arms(scenario: Scenario, *, development: bool = False) -> Iterator[Arm]:
    """Every arm of a scenario."""
    names = ["none", *CALIBRATIONS, *CONTROLS]
    if scenario.regime == "tiny":
        names.append(ABSOLUTE)
    main = [Arm(merge, name) for merge in MERGES for name in names]
    yield from main
    if not scenario.full:
        return
    for arm in main:
        if arm.merge in RANDOM and arm.calibration not in CONTROLS and not development:
            yield from (replace(arm, mask=m, role="mask") for m in range(1, MASKS))
        if arm.merge in DRAWN and arm.calibration in FEATURE and not development:
            yield from (replace(arm, draw=d, role="draw") for d in range(1, DRAWS))
        if arm.merge in CLAMPED and arm.calibration in CALIBRATIONS:
            yield from (replace(arm, clamp=c, role="clamp") for c in CLAMPS)


class Merged:
    """Merged models, each computed once."""

    def __init__(self, problem: Problem, merge: Callable[..., Any] = mf.merge) -> None:
        self._problem, self._merge = problem, merge
        self._known: dict[tuple[str, int], State] = {}

    def __call__(self, method: str, mask: int = 0) -> State:
        key = (method, mask)
        if key not in self._known:
            how: Mapping[str, Any] = {"seed": mask} if method in RANDOM else {}
            self._known[key] = self._merge(
                self._problem.start, self._problem.experts, method, **how
            )
        return self._known[key]


def deviation(problem: Problem, model: State, part: str, size: int) -> dict[str, float]:
    """Per layer |log₂ of Σ‖h_m − h_0‖₂ ÷ Σ‖h_k − h_0‖₂|, mean over the tasks."""
    _, report = mf.calibrate_features(
        problem.start,
        dict(zip(problem.names, problem.experts, strict=True)),
        model,
        problem.samples(part, size, 0),
        model=problem.base,
        p=2,
    )
    found = {}
    for layer in report.layers:
        ratios = torch.stack([*layer.by_task.values(), torch.tensor(0.0)]).double()
        usable: Tensor = ratios[ratios.isfinite() & (ratios > 0)]
        if usable.numel():
            found[layer.name] = float(usable.log2().abs().mean())
    return found

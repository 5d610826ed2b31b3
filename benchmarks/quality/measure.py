"""One scenario with one seed, from nothing to a record of every arm's scores."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from quality import images, text
from quality.arms import CALIBRATIONS, SCALAR, USUAL_SCALE, Arm, Merged, arms, calibrated, deviation
from quality.problem import Problem, Score, State, cosine, element_std, moved, own_scale
from quality.settings import DEVIATION_SIZE, FIXED, MARGINS, Scenario

Scores = list[Score]
BUILD: Mapping[str, Callable[..., Problem]] = {"images": images.build, "text": text.build}


class Judge:
    """Scores states with one scratch model."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._model = copy.deepcopy(problem.base).eval()

    def __call__(self, state: State, part: str) -> Scores:
        self._model.load_state_dict(state)
        return self._problem.score(self._model, part)


def mean(scores: Scores) -> tuple[float, float]:
    """Metric and NLL over the tasks."""
    return (
        sum(s.metric for s in scores) / len(scores),
        sum(s.nll for s in scores) / len(scores),
    )


def best_scale(candidates: Mapping[float, Scores]) -> float:
    """The λ of the best mean metric; among equals the least NLL."""

    def key(scale: float) -> tuple[float, float]:
        metric, nll = mean(candidates[scale])
        return metric, -nll

    return max(candidates, key=key)


def kept_tasks(base: Scores, average: Scores, experts: Scores) -> list[bool]:
    """base ≪ average < expert, by MARGINS of the metric."""
    low, high = MARGINS
    return [
        b.metric + low <= a.metric and a.metric + high <= e.metric
        for b, a, e in zip(base, average, experts, strict=True)
    ]


def row_of(
    problem: Problem,
    judge: Judge,
    arm: Arm,
    state: State,
    grid: Sequence[float],
    *,
    full: bool,
    development: bool,
) -> dict[str, Any]:
    """Scores of one arm: as it comes, at fixed λ, at its best λ."""
    start = problem.start
    row: dict[str, Any] = asdict(arm)
    test: dict[str, Scores] = {}
    validation: dict[str, Scores] = {}  # from which the defaults are chosen

    def at(name: str, scale: float) -> None:
        model = moved(start, state, scale)
        if development:
            validation[name] = judge(model, "validation")
        else:
            test[name] = judge(model, "test")

    usual = USUAL_SCALE.get(arm.merge, 1.0) if arm.calibration == "none" else 1.0
    at("as it comes", usual)
    if usual != 1.0:
        at("1", 1.0)
    if full and arm.calibration in CALIBRATIONS and arm.role in ("main", "clamp"):
        for scale in FIXED if development or arm.role == "main" else ():
            at(f"{scale:.2f}", scale)
    if arm.role == "main" and arm.calibration != SCALAR:  # its grid would be that of none
        centre = own_scale(start, problem.experts, state)
        offered = {c: judge(moved(start, state, centre * c), "validation") for c in grid}
        chosen = best_scale(offered)
        row |= {
            "centre": centre,
            "scale": centre * chosen,
            "edge": chosen in (min(grid), max(grid)),
            "grid": {f"{c:.3g}": mean(scores) for c, scores in offered.items()},
        }
        at("best", row["scale"])
    if arm.role == "main" and arm.calibration in ("none", *CALIBRATIONS) and not development:
        row["deviation"] = deviation(problem, state, "validation", DEVIATION_SIZE)
    return row | {"test": test, "validation": validation}


def reloads(problem: Problem, state: State, expected: Scores) -> bool:
    """Whether the model, saved and opened by plain transformers, gives the same scores."""
    model = copy.deepcopy(problem.base)
    model.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        opened = type(model).from_pretrained(folder, **_plain(model))  # type: ignore[attr-defined]
    return problem.score(opened.eval(), "test") == expected


def _plain(model: torch.nn.Module) -> dict[str, Any]:
    return {"add_pooling_layer": False} if type(model).__name__ == "ViTModel" else {}


def measure(
    seed: int,
    scenario: Scenario,
    grid: Sequence[float],
    *,
    development: bool,
    base: State | None,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], State]:
    """The record of a scenario, and the weights of the base for the next one of its seed."""
    began = time.process_time(), time.perf_counter()
    problem = BUILD[scenario.family](seed, scenario, development=development, base=base)
    say(f"trained after {time.perf_counter() - began[1]:.0f} s")
    judge, merged = Judge(problem), Merged(problem)
    start = problem.start
    bounds: dict[str, dict[str, Scores]] = {}
    for part in ("validation", "test"):
        own = [judge(e, part)[k] for k, e in enumerate(problem.experts)]
        bounds[part] = {"base": judge(start, part), "experts": own}
    average = judge(merged("average"), "validation")
    kept = kept_tasks(bounds["validation"]["base"], average, bounds["validation"]["experts"])
    rows: list[dict[str, Any]] = []
    opened = None
    for arm in arms(scenario, development=development):
        state = calibrated(problem, merged(arm.merge, arm.mask), arm)
        row = row_of(problem, judge, arm, state, grid, full=scenario.full, development=development)
        rows.append(row)
        if arm == Arm("average", "DSC") and scenario.regime != "tiny":
            opened = reloads(problem, state, judge(state, "test"))
        if arm.role == "main" and arm.calibration == "none":
            say(f"{arm.merge} after {time.perf_counter() - began[1]:.0f} s")
    record = {
        "scenario": scenario.name,
        "seed": seed,
        "development": development,
        "tasks": problem.names,
        "kept": kept,
        "cosine": cosine(start, problem.experts),
        "element_std": element_std(start, problem.experts),
        "bounds": bounds,
        "rows": rows,
        "reloaded": opened,
        "grid": list(grid),
        "cpu_seconds": time.process_time() - began[0],
        "seconds": time.perf_counter() - began[1],
    }
    return record, problem.trained

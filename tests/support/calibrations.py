"""The calibrations of the parity grid: every variant, eps mode, granularity and direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch

from magic_fast.ops.job import Job
from magic_fast.recipe import (
    Direction,
    EpsMode,
    Granularity,
    Recipe,
    RowCalibration,
    Variant,
)
from support.cases import CONTENTS, MIXES, RECIPES

#: word → (shape, row axes)
LAYOUTS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "matrix": ((9, 67), (0,)),
    "wide": ((3, 5003), (0,)),
    "column": ((41, 1), (0,)),
    "onerow": ((1, 130), (0,)),
    "bias": ((23,), (0,)),
    "conv": ((6, 3, 3, 3), (0,)),
    "second": ((31, 8), (1,)),
    "stack": ((2, 5, 33), (0, 1)),
}


@dataclass(frozen=True)
class CalibrationCase:
    """One row of the grid; ``word`` names it in test ids."""

    variant: Variant = Variant.MANIFOLD
    eps_mode: EpsMode = EpsMode.RELATIVE
    granularity: Granularity = Granularity.ROW
    direction: Direction = Direction.FREE
    p: float = 2
    mix: str = "f32"
    layout: str = "matrix"
    experts: int = 3
    content: str = "normal"
    recipe: str = "task_arithmetic_default"
    guards: bool = True
    clamp: tuple[float, float] | None = (0.1, 10.0)
    strength: float = 1.0
    scale: float = 1.0
    left_out: bool = False

    @property
    def word(self) -> str:
        rule = f"{self.variant}-p{self.p:g}-{self.eps_mode}-{self.granularity}-{self.direction}"
        policy = "" if self.guards else "-unguarded"
        policy += "" if self.clamp == (0.1, 10.0) else "-unclamped"
        policy += "" if self.strength == 1 else f"-strength{self.strength}"
        policy += "" if self.scale == 1 else f"-scale{self.scale}"
        policy += "-leftout" if self.left_out else ""
        where = f"{self.mix}-K{self.experts}-{self.layout}-{self.content}"
        return f"{rule}{policy}-{where}-{self.recipe}"

    def job(self) -> Job:
        """The job, the same on every call."""
        g = torch.Generator().manual_seed(sum(self.word.encode()))
        shape, axes = LAYOUTS[self.layout]
        base_dtype, expert_dtypes, out_dtype = MIXES[self.mix]
        taus = CONTENTS[self.content](shape, self.experts, g)
        base = (torch.randint(-8, 9, shape, generator=g).double() / 16).to(base_dtype)
        experts = [
            (base.double() + t).to(expert_dtypes[i % len(expert_dtypes)])
            for i, t in enumerate(taus)
        ]
        recipe: Recipe = RECIPES[self.recipe](self.experts)
        rows = math.prod(shape[a] for a in axes)
        included = tuple(not (self.left_out and k == 0) for k in range(self.experts))
        calibration = RowCalibration(
            rows,
            math.prod(shape) // rows,
            axes,
            self.variant,
            self.granularity,
            self.p,
            self.eps_mode,
            self.guards,
            self.clamp,
            self.strength,
            self.scale,
            self.direction,
            included,
        )
        out = torch.empty(shape, dtype=out_dtype)
        return Job(base, experts, recipe, out, "layers.0.weight", calibration=calibration)


def calibration_cases() -> Iterator[CalibrationCase]:
    """The grid. Dtypes, shapes, K and contents are crossed with the variants alone: they end at the
    row sums, and everything after the sums is float64 arithmetic on a row."""
    for variant, eps, granularity, direction in product(Variant, EpsMode, Granularity, Direction):
        if direction is not Direction.AUTO:  # resolved before a backend sees it
            yield CalibrationCase(variant, eps, granularity, direction)
    for variant, mix in product(Variant, MIXES):
        yield CalibrationCase(variant, mix=mix)
    for variant, layout, granularity in product(Variant, LAYOUTS, Granularity):
        yield CalibrationCase(variant, layout=layout, granularity=granularity)
    for variant, experts in product(Variant, (1, 2, 8, 17)):
        yield CalibrationCase(variant, experts=experts, layout="wide")
    for variant, content in product(Variant, ("zerorows", "zeroexpert", "identical", "disjoint")):
        if variant is Variant.MANIFOLD_EXACT and content == "identical":
            continue  # singular but for rounding: cond(G) <= 1e6 is no property of a backend
        yield CalibrationCase(variant, content=content)
    for p, granularity in product((1, 3, math.inf), Granularity):
        yield CalibrationCase(Variant.SPHERE, p=p, granularity=granularity)
    for policy in (
        {"clamp": None},
        {"clamp": (0.9, 1.1)},
        {"strength": 0.5},
        {"scale": 0.3},
        {"left_out": True},
        {"guards": False, "clamp": None, "eps_mode": EpsMode.ABSOLUTE, "content": "zerorows"},
    ):
        yield CalibrationCase(**policy)  # type: ignore[arg-type]
    for recipe in (
        "ties_default",
        "ties_magic",
        "dare_linear_default",
        "magmax",
        "average_default",
    ):
        yield CalibrationCase(recipe=recipe)

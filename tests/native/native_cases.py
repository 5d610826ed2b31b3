"""Random jobs over every recipe field: to compare backends, threads, instruction sets."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.ops.job import Job
from magic_fast.recipe import (
    Consensus,
    Contributors,
    CountRule,
    Direction,
    EpsMode,
    Granularity,
    Recipe,
    Reduce,
    Rescale,
    RowCalibration,
    TieRule,
    Trim,
    TrimRule,
    Variant,
    Vote,
    VoteOn,
    ZeroVote,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [
    (7, 33),
    (64, 64),
    (1,),
    (5,),
    (100,),
    (3, 4, 5),
    (2, 1000),
    (40, 16),
    (),
    (0,),
    (9, 2049),
]


def random_recipe(k: int, rng: random.Random) -> Recipe:
    """One of every combination of stages that makes sense."""
    rules = [TrimRule.NONE, TrimRule.MAGNITUDE, TrimRule.MAGNITUDE, TrimRule.RANDOM]
    rules += [TrimRule.RANKED, TrimRule.BAND, TrimRule.GIVEN]
    trim = Trim(
        rule=rng.choice(rules),
        density=tuple(rng.choice([1.0, 0.2, 0.5, 0.37, 0.9, 0.7]) for _ in range(k)),
        gamma=tuple(rng.choice([0.0, 0.01, 0.1]) for _ in range(k)),
        epsilon=(0.05,) * k,
        count_rule=rng.choice(list(CountRule)),
        tie_rule=rng.choice(list(TieRule)),
        min_kept=rng.choice([0, 1]),
        seed=rng.choice([0, 42, 2**40 + 5]),
    )
    vote = rng.choice([Vote.NONE, Vote.MASS, Vote.MASS, Vote.COUNT])
    contributors = [Contributors.ALL, Contributors.NONZERO]
    if vote is not Vote.NONE:
        contributors += [Contributors.AGREEING] * 2
    consensus = None
    if rng.random() < 0.2:
        consensus = Consensus((0.4,) * k, rng.choice([1, 2]), given=rng.random() < 0.5)
    return Recipe(
        weights=tuple(rng.choice([1.0, 0.3, -0.5, 2.0, 0.7]) for _ in range(k)),
        trim=trim,
        rescale=rng.choice(list(Rescale)),
        vote=vote,
        vote_on=rng.choice(list(VoteOn)),
        zero_vote=rng.choice(list(ZeroVote)),
        contributors=rng.choice(contributors),
        reduce=rng.choice([Reduce.SUM, Reduce.MEAN, Reduce.WEIGHTED_MEAN, Reduce.MAX]),
        consensus=consensus,
        scale=rng.choice([1.0, 0.3]),
    )


def random_calibration(shape: tuple[int, ...], k: int, rng: random.Random) -> RowCalibration | None:
    n = math.prod(shape)
    if not n or not shape or rng.random() < 0.4:
        return None
    leading = rng.randrange(1, len(shape)) if len(shape) > 1 else 1
    rows = math.prod(shape[:leading])
    return RowCalibration(
        rows,
        n // rows,
        axes=tuple(range(leading)),
        variant=rng.choice([Variant.MANIFOLD, Variant.MANIFOLD_EXACT, Variant.SPHERE]),
        granularity=rng.choice([Granularity.ROW, Granularity.ROW, Granularity.TENSOR]),
        p=rng.choice([1, 2, 3, math.inf]),
        eps_mode=rng.choice(list(EpsMode)),
        guards=rng.random() < 0.8,
        clamp=rng.choice([None, (0.1, 10.0)]),
        strength=rng.choice([1.0, 0.5]),
        scale=rng.choice([1.0, 0.9]),
        direction=rng.choice([Direction.FREE, Direction.GROW, Direction.SHRINK]),
        included=rng.choice([(), tuple(rng.random() < 0.8 or i == 0 for i in range(k))]),
    )


@dataclass
class Case:
    """Inputs of one job; :meth:`job` gives it a fresh output."""

    base: Tensor | None
    experts: list[Tensor]
    recipe: Recipe
    masks: list[Tensor] | None
    task_masks: list[Tensor] | None
    calibration: RowCalibration | None
    out_dtype: torch.dtype

    def job(self) -> Job:
        out = torch.zeros(self.experts[0].shape, dtype=self.out_dtype)
        return Job(
            self.base,
            self.experts,
            self.recipe,
            out,
            "layers.0.weight",
            self.masks,
            self.task_masks,
            self.calibration,
        )


def random_case(seed: int, shape: tuple[int, ...] | None = None) -> Case:
    """The case of a seed, always the same."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    k = rng.choice([1, 2, 3, 5, 8, 17])
    shape = rng.choice(SHAPES) if shape is None else shape

    def normal(scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def coins() -> list[Tensor]:
        return [torch.rand(shape, generator=generator) < 0.5 for _ in range(k)]

    base = None if rng.random() < 0.2 else normal(0.02).to(rng.choice(FLOATS))
    if base is None:
        experts = [normal(0.01).to(rng.choice(FLOATS)) for _ in range(k)]
    else:
        experts = [(base.float() + normal(0.002)).to(rng.choice(FLOATS)) for _ in range(k)]
    recipe = random_recipe(k, rng)
    random_trim = recipe.trim.rule in (TrimRule.RANDOM, TrimRule.RANKED)
    given = recipe.trim.rule is TrimRule.GIVEN or (random_trim and rng.random() < 0.3)
    return Case(
        base,
        experts,
        recipe,
        coins() if given else None,
        coins() if recipe.consensus else None,
        random_calibration(shape, k, rng),
        rng.choice(FLOATS),
    )


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: equal means the same bits, NaN and −0 included."""
    return x.reshape(-1).view(torch.uint8)

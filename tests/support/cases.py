"""The one table of cases: recipes, dtype mixes, shapes, contents. Ugly rows included.

What the grid leaves out, and why: not every recipe meets every shape, since a shape changes
addressing and block edges only, which a few recipes of each trim show; not every recipe meets every
dtype on every content, since the conversion to float32 comes before anything a recipe says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.methods.arguments import resolve_arguments
from magic_fast.methods.presets import PRESETS, build_recipe, check_preset
from magic_fast.methods.registry import built_in
from magic_fast.ops.job import Job
from magic_fast.recipe import (
    Align,
    Consensus,
    Contributors,
    CountRule,
    Recipe,
    Reduce,
    Rescale,
    TieRule,
    Trim,
    TrimRule,
    Vote,
    VoteOn,
    ZeroVote,
)

RecipeOf = Callable[[int], Recipe]
_BF16, _F16, _F32, _F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

#: word → (dtype of the base, dtypes of the experts in turn, dtype of the output)
MIXES: Mapping[str, tuple[torch.dtype, tuple[torch.dtype, ...], torch.dtype]] = {
    "f32": (_F32, (_F32,), _F32),
    "bf16": (_BF16, (_BF16,), _BF16),
    "f16": (_F16, (_F16,), _F16),
    "f64": (_F64, (_F64,), _F64),
    "mixed": (_BF16, (_F32, _F16, _BF16), _BF16),
    "widened": (_BF16, (_BF16,), _F32),
    "narrowed": (_F32, (_F32,), _F16),
}

#: 65 536 elements is the block of the sums over a tensor, so `blocks` has two and a rest
SHAPES: Mapping[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0,),
    "emptyrows": (0, 5),
    "emptycols": (5, 0),
    "one": (1,),
    "odd": (37,),
    "row": (1, 41),
    "column": (43, 1),
    "matrix": (9, 35),
    "conv": (6, 3, 3, 3),
    "blocks": (257, 521),
}
EXPERTS = (1, 2, 3, 8, 17)


def _normal(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    return [torch.randn(shape, generator=g, dtype=_F64) * 0.05 for _ in range(k)]


def _ties(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    """Few magnitudes, both signs, many zeros: exact in every dtype."""
    return [torch.randint(-3, 4, shape, generator=g).double() / 64 for _ in range(k)]


def _zero_expert(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    return [t * (i != 0) for i, t in enumerate(_normal(shape, k, g))]


def _identical(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    return [_normal(shape, 1, g)[0]] * k


def _zero_votes(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    """Pairs that cancel, so that the vote is exactly zero where both are kept."""
    pair = _ties(shape, 1, g)[0]
    return [pair if i % 2 == 0 else -pair for i in range(k)]


def _all_equal(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    return [torch.full(shape, 0.25, dtype=_F64) for _ in range(k)]


def _denormal(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    """Multiples of the smallest float32 denormal (zero in float16)."""
    return [torch.randint(-9, 10, shape, generator=g).double() * 2.0**-149 for _ in range(k)]


def _signed_zero(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    return [torch.where(t.abs() < 2 / 64, -0.0 * torch.ones_like(t), t) for t in _ties(shape, k, g)]


def _zero_rows(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    """Row 0 zero in all experts, row 1 in the first."""
    experts = _normal(shape, k, g)
    for i, t in enumerate(experts):
        if t.dim() and t.shape[0]:
            t[0] = 0
            if i == 0 and t.shape[0] > 1:
                t[1] = 0
    return experts


def _disjoint(shape: tuple[int, ...], k: int, g: torch.Generator) -> list[Tensor]:
    owner = torch.randint(0, k, shape, generator=g)
    return [t * (owner == i) for i, t in enumerate(_normal(shape, k, g))]


Content = Callable[[tuple[int, ...], int, torch.Generator], list[Tensor]]
CONTENTS: Mapping[str, Content] = {
    "normal": _normal,
    "ties": _ties,
    "zeroexpert": _zero_expert,
    "identical": _identical,
    "zerovotes": _zero_votes,
    "allequal": _all_equal,
    "denormal": _denormal,
    "signedzero": _signed_zero,
    "zerorows": _zero_rows,
    "disjoint": _disjoint,
}
#: contents whose task vectors must reach the backend as they are: no base
_WITHOUT_BASE = frozenset({"denormal", "signedzero"})


def _weights(k: int) -> tuple[float, ...]:
    """Unequal, none exact in binary, one negative from K = 3 on."""
    return tuple((-0.2 if i == 2 else 0.3 + 0.17 * i) for i in range(k))


def _methods() -> Iterator[tuple[str, RecipeOf]]:
    """Every method that is a recipe, under every preset that has it."""
    for (name, spec), preset in product(built_in().items(), PRESETS):
        if spec.recipe is None or spec.max_experts == 1:
            continue  # what takes one model is in the extra recipes
        try:
            check_preset(preset, name)
        except InputError:
            continue
        weighted = any(p.name == "weight" for p in spec.parameters)

        def of(k: int, name: str = name, preset: str = preset, weighted: bool = weighted) -> Recipe:
            given = {"weights": _weights(k)} if weighted else {}
            arguments = resolve_arguments(name, given, k, preset)
            density = {"mergekit": 0.5}.get(preset)  # absent there means no trim at all
            if density and "density" in arguments:
                arguments["density"] = density
            if "select_topk" in arguments and preset == "default":
                arguments["select_topk"] = 0.4
            return build_recipe(name, k, {**arguments, "seed": 7}, preset=preset)

        yield f"{name}_{preset}", of


def _magnitude(k: int, q: float = 0.4, **rules: object) -> Trim:
    return Trim(TrimRule.MAGNITUDE, density=(q,) * k, **rules)  # type: ignore[arg-type]


def _random(k: int) -> Trim:
    return Trim(TrimRule.RANDOM, density=(0.5,) * k, seed=2**40 + 3)


def _ranked(k: int, **rules: object) -> Trim:
    numbers = {"density": (0.5,) * k, "epsilon": (0.2,) * k}
    return Trim(TrimRule.RANKED, seed=11, **numbers, **rules)  # type: ignore[arg-type]


def _band(k: int, **rules: object) -> Trim:
    numbers = {"density": (0.6,) * k, "gamma": (0.1,) * k}
    return Trim(TrimRule.BAND, **numbers, **rules)  # type: ignore[arg-type]


def _voting(k: int, **fields: object) -> Recipe:
    plain: dict[str, object] = {
        "weights": (1.0,) * k,
        "trim": _magnitude(k),
        "vote": Vote.MASS,
        "contributors": Contributors.AGREEING,
    }
    return Recipe(**{**plain, **fields})  # type: ignore[arg-type]


def _choices() -> Iterator[tuple[str, RecipeOf]]:
    """Every choice at every stage, beside what the methods use."""
    for zero, reduce in product(
        ZeroVote, (Reduce.SUM, Reduce.MEAN, Reduce.WEIGHTED_MEAN, Reduce.MAX)
    ):
        for vote in (Vote.MASS, Vote.COUNT):
            yield (
                f"vote_{vote}_{zero}_{reduce}",
                lambda k, v=vote, z=zero, r=reduce: _voting(k, vote=v, zero_vote=z, reduce=r),
            )
    for count, tie in product(CountRule, TieRule):
        yield (
            f"count_{count}_{tie}",
            lambda k, c=count, t=tie: Recipe(
                (1.0,) * k, trim=_magnitude(k, count_rule=c, tie_rule=t)
            ),
        )
    trims = {"magnitude": _magnitude, "random": _random, "ranked": _ranked, "band": _band}
    for (word, trim), rescale in product(trims.items(), Rescale):
        yield (
            f"rescale_{word}_{rescale}",
            lambda k, t=trim, r=rescale: Recipe(_weights(k), trim=t(k), rescale=r),
        )
    for vote_on in VoteOn:
        yield (
            f"vote_on_{vote_on}",
            lambda k, v=vote_on: _voting(
                k, weights=_weights(k), vote_on=v, reduce=Reduce.WEIGHTED_MEAN
            ),
        )


def _aligned(k: int, **fields: object) -> Recipe:
    plain: dict[str, object] = {"weights": _weights(k), "align": Align.MIN_NORM}
    return Recipe(**{**plain, **fields})  # type: ignore[arg-type]


def _across() -> Iterator[tuple[str, RecipeOf]]:
    """What looks at the experts together, with numbers that act on values this small."""
    yield "limit", lambda k: Recipe((1.0,) * k, limit=0.05, scale=0.7)
    yield "limit_zero", lambda k: Recipe((1.0,) * k, reduce=Reduce.MEAN, limit=0.0)
    yield "ram_coarse", lambda k: build_recipe("ram", k, {"epsilon": 0.04, "rescale": "l1"})
    yield (
        "ramplus_coarse",
        lambda k: build_recipe("ramplus_tl", k, {"r": 0.5, "alpha": 0.9, "epsilon": 0.04}),
    )
    for word, trim in {
        "magnitude": _magnitude, "random": _random, "ranked": _ranked, "band": _band
    }.items():  # fmt: skip
        yield f"align_{word}", lambda k, t=trim: _aligned(k, trim=t(k), rescale=Rescale.L1)
    yield "align_dare", lambda k: _aligned(k, trim=_random(k), rescale=Rescale.KEEP_PROBABILITY)
    yield "align_sum", lambda k: _aligned(k)
    yield (
        "align_majority",
        lambda k: _voting(k, align=Align.MIN_NORM, zero_vote=ZeroVote.MAJORITY, reduce=Reduce.MEAN),
    )


def _extras() -> Iterator[tuple[str, RecipeOf]]:
    yield "passthrough", lambda k: Recipe((1.3,) + (0.0,) * (k - 1))
    yield "magmax", lambda k: Recipe((1.0,) * k, reduce=Reduce.MAX, scale=0.5)
    yield "emr", lambda k: _voting(k, trim=Trim(), zero_vote=ZeroVote.NEGATIVE, reduce=Reduce.MAX)
    yield (
        "nonzero_mean",
        lambda k: Recipe((1.0,) * k, contributors=Contributors.NONZERO, reduce=Reduce.MEAN),
    )
    yield (
        "zero_sum_weights",
        lambda k: Recipe(tuple((-1.0) ** i for i in range(k)), reduce=Reduce.WEIGHTED_MEAN),
    )
    yield (
        "band_without_outliers",
        lambda k: Recipe((1.0,) * k, trim=_band(k, empty_band_zeroes=True)),
    )
    yield "ranked_along_1", lambda k: Recipe((1.0,) * k, trim=_ranked(k, rank_dim1=True))
    yield (
        "densities_differ",
        lambda k: _voting(
            k,
            trim=Trim(TrimRule.MAGNITUDE, density=tuple((1.0, 0.5, 0.05)[i % 3] for i in range(k))),
        ),
    )
    yield (
        "given_masks",
        lambda k: Recipe(_weights(k), trim=Trim(TrimRule.GIVEN), rescale=Rescale.L2),
    )
    yield (
        "consensus",
        lambda k: Recipe((1.0,) * k, consensus=Consensus((0.4,) * k, min_tasks=min(2, k))),
    )
    yield (
        "consensus_of_ties",
        lambda k: _voting(k, consensus=Consensus((0.3,) * k, min_tasks=min(2, k)), scale=0.7),
    )
    yield (
        "consensus_given",
        lambda k: Recipe((1.0,) * k, consensus=Consensus((), min_tasks=min(2, k), given=True)),
    )


RECIPES: Mapping[str, RecipeOf] = dict([*_methods(), *_choices(), *_extras(), *_across()])
#: one of each trim, for the shapes
SOME_RECIPES = (
    "task_arithmetic_default",
    "ties_default",
    "ties_magic",
    "dare_ties_default",
    "della_default",
    "breadcrumbs_ties_default",
    "consensus",
    "magmax",
    "sce_default",
    "ramplus_coarse",
    "align_band",
)


@dataclass(frozen=True)
class MergeCase:
    """One row of the table; ``word`` names it in test ids."""

    recipe: str
    mix: str = "f32"
    shape: str = "odd"
    experts: int = 3
    content: str = "normal"

    @property
    def word(self) -> str:
        return f"{self.mix}-K{self.experts}-{self.shape}-{self.recipe}-{self.content}"

    def job(self) -> Job:
        """The job, the same on every call."""
        g = torch.Generator().manual_seed(sum(self.word.encode()))
        shape, k = SHAPES[self.shape], self.experts
        base_dtype, expert_dtypes, out_dtype = MIXES[self.mix]
        taus = CONTENTS[self.content](shape, k, g)
        dtypes = [expert_dtypes[i % len(expert_dtypes)] for i in range(k)]
        recipe = RECIPES[self.recipe](k)
        base = None
        if self.content in _WITHOUT_BASE:
            experts = [t.to(d) for t, d in zip(taus, dtypes, strict=True)]
        else:
            # the base is on the coarse grid of the tied contents, so their task vectors stay exact
            base = (torch.randint(-8, 9, shape, generator=g).double() / 16).to(base_dtype)
            experts = [(base.double() + t).to(d) for t, d in zip(taus, dtypes, strict=True)]
        job = Job(base, experts, recipe, torch.empty(shape, dtype=out_dtype), "layers.0.weight")
        if recipe.trim.rule is TrimRule.GIVEN:
            job.masks = [None if i == 1 else torch.rand(shape, generator=g) < 0.6 for i in range(k)]
        if recipe.consensus is not None and recipe.consensus.given:
            job.task_masks = [
                (torch.rand(shape, generator=g) < 0.6).to(torch.uint8) for _ in range(k)
            ]
        return job


def is_quick(case: MergeCase) -> bool:
    """Whether a run without the slow part has it: every recipe in float32 and bfloat16, a
    recipe of each trim on every content and shape."""
    if case.recipe not in SOME_RECIPES:
        return case.content == "normal" and case.mix in ("f32", "bf16")
    return case.experts in (2, 3) or (case.experts == 17 and case.shape in ("odd", "matrix"))


def merge_cases() -> Iterator[MergeCase]:
    """The grid."""
    for recipe, mix in product(RECIPES, MIXES):
        yield MergeCase(recipe, mix)
    for recipe, content in product(RECIPES, CONTENTS):
        if content != "normal":
            # two experts: pairs cancel
            yield MergeCase(recipe, "f32", "matrix", 2, content)
    for recipe, content in product(SOME_RECIPES, CONTENTS):
        yield MergeCase(recipe, "bf16", "matrix", 2, content)
    for recipe, shape, experts in product(SOME_RECIPES, SHAPES, EXPERTS):
        if shape != "blocks" or experts == 3:
            yield MergeCase(recipe, "bf16", shape, experts)


assert math.prod(SHAPES["blocks"]) > 2 * 65_536

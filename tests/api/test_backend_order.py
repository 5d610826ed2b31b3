"""The automatic choice on a GPU follows what was measured there, operation by operation."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from magic_fast.ops import choice
from magic_fast.ops.job import Job
from magic_fast.ops.order import FASTEST, SMALL_ELEMENTS, Operation, operation_of
from magic_fast.ops.registry import SPECS, measured_order
from magic_fast.recipe import Recipe, RowCalibration, Trim, TrimRule, Weigh
from magic_fast.recipe.words import Reduce

MEASURED = {
    "task arithmetic + WSC, K = 8": Operation.SUM,
    "DARE-TIES + WSC, K = 8": Operation.SUM,
    "a block of Llama 8B, task arithmetic + WSC, K = 4": Operation.SUM,
    "TIES q 0.2 + WSC, K = 3": Operation.SEARCH,
    "TIES q 0.2 + WSC, K = 8": Operation.SEARCH,
    "row norms + Gram, K = 8": Operation.ROWS,
    "2000 tensors of 4096, task arithmetic, K = 4": Operation.SMALL,
}


def test_the_table_is_what_was_measured(root: Path) -> None:
    """Whoever measures anew is told here what to change in the table."""
    rows = json.loads((root / "benchmarks/results/gpu.json").read_text())["bench"]["rows"]
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["backend"] in FASTEST[Operation.OTHER]:
            times.setdefault(row["work"], {})[row["backend"]] = row["seconds"]
    assert times.keys() == MEASURED.keys()
    order = {work: tuple(sorted(found, key=found.__getitem__)) for work, found in times.items()}
    assert order == {work: FASTEST[operation] for work, operation in MEASURED.items()}
    ((first, _),) = Counter(names[0] for names in order.values()).most_common(1)
    assert FASTEST[Operation.OTHER][0] == first
    assert FASTEST.keys() == set(Operation)


def test_those_that_are_not_in_it_keep_their_place(own_registry: None) -> None:
    names = [spec.name for spec in SPECS]
    for operation in Operation:
        found = [spec.name for spec in measured_order(operation)]
        assert sorted(found) == sorted(names)
        assert [n for n in found if n in FASTEST[operation]] == list(FASTEST[operation])
        for n, name in enumerate(names):
            assert name in FASTEST[operation] or found[n] == name


TRIM = Trim(TrimRule.MAGNITUDE, density=(0.2,))
SCORED = Recipe(
    (1.0,),
    Trim(TrimRule.COMPETE, density=(0.2,)),
    weigh=Weigh.SCORE,
    reduce=Reduce.WEIGHTED_MEAN,
)
LARGE = (SMALL_ELEMENTS // 16 + 1, 16)


def job(recipe: Recipe, shape: tuple[int, ...] = LARGE, **more: object) -> Job:
    return Job(None, [torch.empty(shape, device="meta")], recipe, **more)


@pytest.mark.parametrize(
    ("work", "primitive", "operation"),
    [
        (job(Recipe((1.0,))), "merge", Operation.SUM),
        (job(Recipe((1.0,)), (8, 8)), "merge", Operation.SMALL),
        (job(Recipe((1.0,)), (8, 8), calibration=RowCalibration(8, 8)), "merge", Operation.SUM),
        (job(Recipe((1.0,), TRIM)), "merge", Operation.SEARCH),
        (job(Recipe((1.0,), TRIM), (8, 8)), "merge", Operation.SEARCH),
        (job(Recipe((1.0,), TRIM)), "select", Operation.SEARCH),
        (job(Recipe((1.0,), Trim(TrimRule.RANDOM, density=(0.2,)))), "merge", Operation.SUM),
        (job(Recipe((1.0,), Trim(TrimRule.VARIANCE, density=(0.2,)))), "merge", Operation.OTHER),
        (job(SCORED), "merge", Operation.OTHER),
        (job(Recipe((1.0,))), "row_stats", Operation.ROWS),
        (job(Recipe((1.0,))), "calibrate", Operation.ROWS),
        (job(Recipe((1.0,))), "scale", Operation.OTHER),
    ],
)
def test_what_a_job_is(work: Job, primitive: str, operation: Operation) -> None:
    assert operation_of(work, primitive) is operation


def test_the_choice_follows_it(own_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name it does not."""

    @dataclass
    class Fake:
        name: str
        merge = row_stats = True

        def supports(self, job: Job) -> str | None:
            return None

    @dataclass
    class OnGpu:
        shape: tuple[int, ...]
        device: str = "cuda:1"

    monkeypatch.delenv("MAGIC_FAST_BACKEND", raising=False)
    monkeypatch.setattr(choice, "loaded", lambda name: (Fake(name), None))
    monkeypatch.setattr(choice, "devices_of", lambda spec: spec.devices)
    jobs = [Job(None, [OnGpu(LARGE)], Recipe((1.0,), trim)) for trim in (Trim(), TRIM)]
    jobs.append(Job(None, [OnGpu((2, 2))], Recipe((1.0,))))
    assert [one.name for one in choice.choose(jobs)] == ["triton", "cuda", "triton"]
    assert choice.choose(jobs[1:2], primitive="row_stats")[0].name == "triton"
    for name in ("cuda", "triton"):
        assert {one.name for one in choice.choose(jobs, name)} == {name}
    assert choice.automatic("cuda") == ("cuda", "triton")

"""The pure parts of the calibration evidence: splits, scores, statistics, tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from quality import arms, collect, defaults, images, measure, paired, settings, table, text
from quality.problem import (
    PARTS,
    Problem,
    Score,
    cosine,
    element_std,
    moved,
    own_scale,
    score_logits,
)


def test_no_original_image_is_in_two_parts() -> None:
    for seed in (0, 1, 100):
        parts = images.split(seed)
        assert tuple(parts) == PARTS
        everything = torch.cat(list(parts.values()))
        assert everything.unique().numel() == everything.numel() == 1797
    assert not torch.equal(images.split(0)["test"], images.split(1)["test"])


def test_no_prompt_is_in_two_parts() -> None:
    parts = text.prompts()
    everything = torch.cat(list(parts.values()))
    assert len(everything) == len(everything.unique(dim=0)) == 10_000
    shares = [len(rows) / 10_000 for rows in parts.values()]
    assert shares == pytest.approx(text.SHARES, abs=0.01)


def test_development_has_other_tasks() -> None:
    for regime in ("easy", "correlated"):
        assert images.TASKS[regime, False] != images.TASKS[regime, True]
    assert not set(text.TASKS[False]) & set(text.TASKS[True])
    assert not set(settings.SEEDS) & set(settings.DEVELOPMENT_SEEDS)


def test_permutations_keep_every_pixel() -> None:
    image = torch.arange(64.0).view(1, 8, 8)
    mixed = images.permuted(24, 3)(image)
    assert sorted(mixed.flatten().tolist()) == list(range(64))
    assert 0 < int((mixed != image).sum()) <= 24


def test_score() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    found = score_logits(logits, torch.tensor([0, 0, 1, 1]))
    confidence = float(torch.tensor(2.0).double().sigmoid())
    assert found.metric == 0.75
    wrong = -torch.tensor(1 - confidence).double().log()
    right = -torch.tensor(confidence).double().log()
    assert found.nll == pytest.approx(float(3 * right + wrong) / 4, rel=1e-6)
    assert found.ece == pytest.approx(abs(0.75 - confidence))


def test_exact_match_wants_every_digit() -> None:
    answers = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    logits = nn.functional.one_hot(answers, 10).float() * 9
    logits[1, 3] = logits[1, 3].roll(1)
    assert text.score_answers(logits, answers).metric == 0.5


def test_task_vector_facts() -> None:
    start = {"a": torch.zeros(2), "frozen": torch.ones(3)}
    experts = [
        {"a": torch.tensor([3.0, 0.0]), "frozen": torch.ones(3)},
        {"a": torch.tensor([0.0, 5.0]), "frozen": torch.ones(3)},
    ]
    end = moved(start, experts[0], 0.5)
    assert end["a"].tolist() == [1.5, 0.0]
    assert own_scale(start, experts, end) == pytest.approx(4 / 1.5)
    assert cosine(start, experts) == pytest.approx(0.0)
    assert element_std(start, experts) == pytest.approx(float(torch.tensor([3.0, 0, 0, 5]).std()))


def test_best_scale_prefers_the_score_then_the_likelihood() -> None:
    offered = {
        0.5: [Score(0.5, 2.0, 0.0)],
        1.0: [Score(0.75, 3.0, 0.0)],
        2.0: [Score(0.75, 1.0, 0.0)],
    }
    assert measure.best_scale(offered) == 2.0


def test_kept_tasks() -> None:
    def scores(*metrics: float) -> list[Score]:
        return [Score(m, 0.0, 0.0) for m in metrics]

    base, average = scores(0.1, 0.45, 0.1), scores(0.5, 0.5, 0.5)
    assert measure.kept_tasks(base, average, scores(0.9, 0.9, 0.51)) == [True, False, False]


def test_difference_is_paired_and_draws_whole_seeds() -> None:
    a = {(s, t): 0.5 + 0.1 * s for s in range(5) for t in "xyz"}
    b = {cell: value - 0.02 for cell, value in a.items()}
    found = paired.difference(a, b, 200)
    assert found is not None and found.seen and (found.cells, found.seeds) == (15, 5)
    assert (found.low, found.mean, found.high) == pytest.approx((0.02,) * 3)
    # All the variation is between seeds: the interval must not shrink with the number of tasks.
    few = {(s, t): 0.1 * (-1) ** s for s in range(4) for t in "x"}
    many = {(s, t): 0.1 * (-1) ** s for s in range(4) for t in map(str, range(50))}
    zero = dict.fromkeys(many, 0.0)
    wide = paired.difference(many, zero, 400)
    narrow = paired.difference(few, dict.fromkeys(few, 0.0), 400)
    assert wide is not None and narrow is not None and not wide.seen
    assert wide.high - wide.low == pytest.approx(narrow.high - narrow.low, abs=0.02)
    assert paired.difference(a, {}, 200) is None


def record(seed: int, gain: float, *, development: bool = False) -> dict[str, Any]:
    """Two tasks, one of them not kept; every calibration adds ``gain`` to the score."""
    rows = []
    for arm in arms.arms(settings.SCENARIOS["text/easy"]):
        score = 0.5 + 0.01 * seed + (gain if arm.calibration != "none" else 0.0)
        if arm.calibration == "WSC sphere":
            score += 0.05
        both = [[score, 1.0, 0.1], [0.0, 9.0, 0.9]]
        names = ["as it comes", "best", "0.71", "1.41"]
        row = {
            **vars(arm), "test": {} if development else dict.fromkeys(names, both),
            "validation": dict.fromkeys(names, both) if development else {},
        }  # fmt: skip
        if arm.role == "main":
            row |= {"centre": 1.0, "scale": 1.0, "edge": seed == 0, "deviation": {"layer": 0.5}}
        rows.append(row)
    own = {"base": [[0.1, 3.0, 0.1]] * 2, "experts": [[1.0, 0.1, 0.0]] * 2}
    return {
        "scenario": "text/easy", "seed": seed, "development": development, "tasks": ["a", "b"],
        "kept": [True, False], "cosine": 0.1, "element_std": 1e-3, "reloaded": True,
        "bounds": {"test": own, "validation": own}, "rows": rows, "cpu_seconds": 60.0,
        "seconds": 120.0,
    }  # fmt: skip


def test_tables_say_what_was_run(tmp_path: Path) -> None:
    records = [record(s, 0.1) for s in range(3)] + [record(100, 0.1, development=True)]
    table.write(records, markdown=tmp_path / "q.md", summary=tmp_path / "q.json")
    lines = (tmp_path / "q.md").read_text()
    assert "4 runs (a scenario with a seed): 4 minutes of one core, 8 minutes" in lines
    row = "| text/easy | 3 | 3 of 6 | 0.100 ± 0.000 | 0.510 ± 0.010 | 1.000 ± 0.000 | 51 % |"
    assert row in lines
    assert "**+0.100 [+0.100, +0.100]**" in lines and "**+0.150 [+0.150, +0.150]**" in lines
    assert "| text/easy | 8 of 24 |" in lines  # the best λ at an edge: seed 0 of every merge
    assert "images" not in lines.split("## The scenarios")[1].split("## ")[0]
    assert "nan" not in lines


def test_defaults_are_chosen_on_development_seeds_alone() -> None:
    chosen = defaults.choose([record(100, 0.1, development=True)])
    assert str(chosen["WSC"].setting) == "WSC sphere, λ 1"
    assert str(chosen["FSC"].setting) == "FSC, λ 1" and chosen["FSC"].clamp == ""
    reported = table.Results([record(0, 0.1)])
    assert defaults.choose(reported.development) == {}


def test_permuted_rows_keep_the_coefficients() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=False)
    start = {"weight": base.weight.detach()}
    experts = [{"weight": start["weight"] + 0.1 * torch.randn(5, 6)} for _ in range(3)]
    problem = Problem(base, experts, ["a", "b", "c"], None, None, {})  # type: ignore[arg-type]
    merged = arms.Merged(problem)("average")
    own = arms.weight_calibrated(problem, merged)
    other = arms.permuted_rows(problem, merged, "manifold", seed=1)

    def factors(state: dict[str, torch.Tensor]) -> list[float]:
        moved_rows = state["weight"] - start["weight"]
        ratio = moved_rows.norm(dim=1) / (merged["weight"] - start["weight"]).norm(dim=1)
        return [round(x, 4) for x in ratio.tolist()]

    assert factors(own) != factors(other) and sorted(factors(own)) == sorted(factors(other))


def test_collected_cells_leave_out_dropped_tasks() -> None:
    found = collect.cells([record(2, 0.1)], "average", "none", "best")
    assert found == {(2, "a"): pytest.approx(0.52)}
    assert collect.within_seed_spread([record(2, 0.1)], "mask", "none", "as it comes") == 0.0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[settings.Scenario]:
    monkeypatch.setitem(settings.BASE, "text", settings.Training(12, 3e-3))
    monkeypatch.setattr(text, "TESTED", {"validation": 8, "test": 8})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield replace(settings.SCENARIOS["text/easy"], expert=settings.Training(3, 5e-4))
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_scenario_runs_whole(small: settings.Scenario, tmp_path: Path) -> None:
    found, _ = measure.measure(0, small, (0.5, 1.0), development=False, base=None, say=print)
    assert found["reloaded"] is True
    assert len(found["rows"]) == len(list(arms.arms(small)))
    table.write([found], markdown=tmp_path / "q.md", summary=tmp_path / "q.json")

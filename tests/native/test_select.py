"""Exact selection: against sorting on 100 000 small cases and on adversarial data, in memory and
streamed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import magic_fast as mf
from magic_fast import _native
from magic_fast.ops.job import Job, View
from magic_fast.ops.native.backend import NativeBackend
from magic_fast.ops.native.jobs import Call
from magic_fast.ops.native.search import StreamingSelect
from magic_fast.ops.search import cut_for, select_over
from magic_fast.recipe import CountRule, Recipe, Selection, TieRule, Trim, TrimRule, TrimScope
from magic_fast.reference import merge as reference
from magic_fast.reference.scope import select_model
from magic_fast.reference.trim import select_trim


def magnitudes(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [n] of one kind of data."""
    makers = {
        "normal": lambda: rng.standard_normal(n),
        "few values": lambda: rng.integers(-3, 4, n),
        "equal": lambda: np.full(n, 0.5),
        "two values": lambda: np.where(rng.random(n) < 0.5, 0.5, -0.25),
        "sorted": lambda: np.arange(n) * 1e-6,
        "denormals": lambda: rng.integers(-100, 100, n) * 1e-45,
        "zeros": lambda: np.zeros(n),
        "periodic": lambda: np.arange(n) % 16,
        "two halves": lambda: rng.standard_normal(n) * np.where(np.arange(n) < n // 2, 1e-5, 1.0),
        "spread": lambda: np.exp(rng.uniform(-80, 80, n)),
    }
    return makers[kind]().astype(np.float32)


KINDS = [
    *("normal", "few values", "equal", "two values", "sorted"),
    *("denormals", "zeros", "periodic", "two halves", "spread"),
]


def view(x: np.ndarray) -> View:
    return View(x.ctypes.data, "F32", x.shape, x)


def by_sorting(x: np.ndarray, count: int) -> tuple[float, int]:
    """(threshold, tie cut) that keep the ``count`` largest, by a stable sort."""
    if count == 0:
        return float("inf"), 0
    order = np.argsort(-np.abs(x), kind="stable")[:count]
    threshold = np.abs(x[order[-1]])
    return float(threshold), int(order[np.abs(x[order]) == threshold].max()) + 1


def test_100_000_small_cases_against_sorting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        jobs, expected, alive = [], [], []
        call = Call()
        recipes = {q: _magnitude(q) for q in (0.1, 0.3, 0.5, 0.9)}
        for _ in range(1000):
            n = int(rng.integers(1, 90))
            x = magnitudes(KINDS[rng.integers(len(KINDS))], n, rng)
            q = (0.1, 0.3, 0.5, 0.9)[rng.integers(4)]
            alive.append(x)
            jobs.append(call.job(Job(None, [view(x)], recipes[q])))
            expected.append(by_sorting(x, recipes[q].trim.kept_count(0, n)))
        found = _native.select(jobs)
        assert [(f[0][0], f[1][0]) for f in found] == expected


def _magnitude(q: float) -> Recipe:
    return Recipe((1.0,), Trim(TrimRule.MAGNITUDE, density=(q,)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [65536, 65537, 400_003])
def test_large_and_adversarial(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x = magnitudes(kind, n, rng)
    t = torch.from_numpy(x)
    for rule in (TieRule.EXACT, TieRule.KEEP_ALL, TieRule.DROP_ALL):
        for trim in (
            Trim(TrimRule.MAGNITUDE, density=(0.2,), tie_rule=rule),
            Trim(TrimRule.MAGNITUDE, density=(0.999,), tie_rule=rule),
            Trim(TrimRule.BAND, density=(0.5,), gamma=(0.03,), tie_rule=rule),
        ):
            found = NativeBackend().select(Job(None, [t], Recipe((1.0,), trim)))
            assert _numbers(found) == select_trim(t, trim, 0)


def _numbers(s: Selection, k: int = 0) -> tuple[float, int, float, int]:
    return s.threshold[k], s.tie_cut[k], s.top_threshold[k], s.top_tie_cut[k]


def stream(
    recipe: Recipe, base: torch.Tensor | None, experts: list[torch.Tensor], cut: int, seed: int
) -> tuple[Selection, float]:
    """The selection of data that comes in pieces in random order, and how often it was read."""
    n, rng = experts[0].numel(), random.Random(seed)
    search, read = StreamingSelect(recipe, n, name="layers.0.weight"), 0
    while ranges := search.wants():
        pieces = [(i, min(i + cut, b)) for a, b in ranges for i in range(a, b, cut)]
        rng.shuffle(pieces)
        for a, b in pieces:
            read += b - a
            search.feed(None if base is None else base[a:b], [e[a:b] for e in experts], offset=a)
    return search.result(), read / n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1000, 65536, 100_000])
def test_streamed_is_in_memory(kind: str, cut: int) -> None:
    n = 262_147 if cut > 1000 else 20_011
    x = [torch.from_numpy(magnitudes(kind, n, np.random.default_rng(s))) for s in (1, 2)]
    trim = Trim(TrimRule.MAGNITUDE, density=(0.2, 0.7), count_rule=CountRule.FLOOR_PLUS_ONE)
    recipe = Recipe((1.0, 1.0), trim)
    found, passes = stream(recipe, None, x, cut, seed=cut)
    assert [_numbers(found, k) for k in (0, 1)] == [select_trim(x[k], trim, k) for k in (0, 1)]
    assert passes < 5.5  # linear: four passes at most, and looks at single pieces


@pytest.mark.parametrize("seed", range(300))
def test_small_streams(seed: int) -> None:
    """All of the bracket logic on little data."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 3000))
    x = torch.from_numpy(magnitudes(KINDS[seed % len(KINDS)], n, rng))
    trim = Trim(TrimRule.BAND, density=(float(rng.uniform(0.01, 0.99)),), gamma=(0.05,))
    found, _ = stream(Recipe((1.0,), trim), None, [x], int(rng.integers(1, n + 1)), seed)
    assert _numbers(found) == select_trim(x, trim, 0)


def test_streamed_factors_and_majority() -> None:
    from magic_fast.recipe import Contributors, Rescale, Vote, ZeroVote

    generator = torch.Generator().manual_seed(5)
    base = (torch.randn(300_000, generator=generator) * 0.02).bfloat16()
    experts = [
        (base.float() + torch.randn(300_000, generator=generator) * 0.002).bfloat16()
        for _ in range(3)
    ]
    for rule in (TrimRule.MAGNITUDE, TrimRule.RANDOM):
        for rescale in (Rescale.L1, Rescale.L2, Rescale.LINF):
            recipe = Recipe(
                (1.0,) * 3,
                Trim(rule, density=(0.3,) * 3, seed=3),
                rescale,
                vote=Vote.COUNT,
                zero_vote=ZeroVote.MAJORITY,
                contributors=Contributors.AGREEING,
            )
            job = Job(base, experts, recipe, name="layers.0.weight")
            assert stream(recipe, base, experts, 65536, 1)[0] == NativeBackend().select(job)


def test_model_scope_is_one_tensor() -> None:
    """Tensors one behind the other have the thresholds of their concatenation."""
    rng = np.random.default_rng(9)
    parts = [torch.from_numpy(magnitudes("few values", n, rng)) for n in (70_000, 13, 1, 130_001)]
    whole = torch.cat(parts)
    recipe = _magnitude(0.3)
    search, start = StreamingSelect(recipe, whole.numel()), 0
    starts = [0, 70_000, 70_013, 70_014]
    while ranges := search.wants():
        for a, b in ranges:
            for start, part in zip(starts, parts, strict=True):
                low, high = max(a - start, 0), min(b - start, part.numel())
                if low < high:
                    search.feed(None, [part[low:high]], offset=start + low)
    found = search.result()
    assert _numbers(found) == select_trim(whole, recipe.trim, 0)
    out = torch.cat([torch.zeros_like(p) for p in parts])
    for start, part in zip(starts, parts, strict=True):
        local = cut_for(found, start, part.numel())
        NativeBackend().merge(
            Job(None, [part], recipe, out[start : start + part.numel()], selection=local)
        )
    assert int((out != 0).sum()) == recipe.trim.kept_count(0, whole.numel())


def test_kth_magnitude_and_row_norms() -> None:
    x = torch.randn(37, 501, generator=torch.Generator().manual_seed(1))
    backend = NativeBackend()
    for k in (1, 18, x.numel()):
        assert backend.kth_magnitude(x, k) == float(
            x.abs().flatten().sort(descending=True)[0][k - 1]
        )
    l1, l2, linf = backend.row_norms(x)
    assert torch.allclose(l1, x.double().abs().sum(1), rtol=1e-14)
    assert torch.allclose(l2, x.double().norm(dim=1), rtol=1e-14)
    assert torch.equal(linf, x.double().abs().amax(1))


@pytest.mark.parametrize("tie_rule", [TieRule.EXACT, TieRule.KEEP_ALL])
@pytest.mark.parametrize("rule", [TrimRule.MAGNITUDE, TrimRule.BAND])
def test_tensors_in_memory_as_one(rule: TrimRule, tie_rule: TieRule) -> None:
    """Scope ``model``, natively and by the reference; values that tie across tensors."""
    g = torch.Generator().manual_seed(1)
    trim = Trim(rule, density=(0.3, 0.6), gamma=(0.05, 0.05), tie_rule=tie_rule,
                scope=TrimScope.MODEL)  # fmt: skip
    recipe = Recipe((1.0, 1.0), trim)
    jobs = []
    for shape in ((40, 50), (7,), (), (0, 3), (70_000,)):
        base, *experts = (torch.randint(-9, 10, shape, generator=g) / 8 for _ in range(3))
        jobs.append(Job(base, experts, recipe, name=f"t{len(jobs)}"))
    want = select_model(lambda: ((job.base, job.experts) for job in jobs), recipe)
    for job, found, expected in zip(jobs, select_over(jobs, StreamingSelect), want, strict=True):
        own, other = (
            reference.decide(job.base, job.experts, recipe, selection=s).keep
            for s in (found, expected)
        )
        for a, b in zip(own, other, strict=True):
            assert a is None or b is None or torch.equal(a, b)
        assert (found.threshold, found.top_threshold) == (
            expected.threshold, expected.top_threshold
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_kth_magnitude_of_any_tensor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for y in (x, x.T, x[:, ::3], x[3, 4]):
        ordered = y.abs().flatten().sort(descending=True).values
        for k in {1, -(-y.numel() // 3), y.numel()}:
            assert mf.kth_magnitude(y, k) == float(ordered[k - 1])
    monkeypatch.setenv("MAGIC_FAST_BACKEND", "torch")
    assert mf.kth_magnitude(x, 700) == float(x.abs().flatten().sort(descending=True).values[699])

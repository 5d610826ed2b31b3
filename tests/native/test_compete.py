"""Parameter competition on the CPU: bounds against sorting, values against float64, the same bits
for any instruction set, thread count and cut."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from magic_fast.methods.presets import build_recipe
from magic_fast.ops.job import Job
from magic_fast.ops.native.backend import NativeBackend
from magic_fast.ops.native.search import StreamingSelect
from magic_fast.ops.search import cut_for
from magic_fast.recipe import Recipe, Selection
from magic_fast.reference import merge as reference
from magic_fast.reference import pcb
from native.conftest import isas

SIZES = [1, 2, 15, 16, 17, 513, 70_001]


def recipe_of(k: int, ratio: float = 0.3, scale: float = 1.0) -> Recipe:
    return build_recipe("pcb", k, {"ratio": ratio, "scope": "tensor", "scale": scale})


def vectors(n: int, k: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(n + k)
    return [torch.randn(n, generator=g) * scale for _ in range(k)]


def bounds_of(found: Selection) -> pcb.Bounds:
    return pcb.Bounds(found.threshold, found.top_threshold, found.score_cut, found.score_top)


@pytest.mark.parametrize("ratio", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("n", SIZES)
def test_bounds(n: int, k: int, ratio: float) -> None:
    """Magnitudes exactly those of sorting; scores too, but for the last bits of exp and tanh."""
    taus = vectors(n, k)
    found = NativeBackend().select(Job(None, taus, recipe_of(k, ratio)))
    for e, tau in enumerate(taus):
        ordered = tau.abs().sort().values
        assert found.threshold[e] == float(ordered[math.trunc(1e-4 * n)])
        assert found.top_threshold[e] == float(ordered[max(math.trunc((1 - 1e-4) * n - 1), 0)])
        scores = pcb.scores(taus, e, bounds_of(found)).sort().values
        cut = float(scores[min(math.trunc((1 - ratio) * n), n - 1)])
        assert found.score_cut[e] == pytest.approx(cut, rel=1e-6, abs=1e-30)
        assert found.score_top[e] == pytest.approx(float(scores[-1]), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_values_against_float64(k: int, scale: float) -> None:
    """With the decisions taken, as near as the same formula in PyTorch's float32. Where the shares
    of all are nearly zero their quotient is noise in any float32."""
    taus = vectors(60_000, k, scale)
    recipe, out = recipe_of(k), torch.empty(60_000)
    selection = NativeBackend().select(Job(None, taus, recipe))
    NativeBackend().merge(Job(None, taus, recipe, out, selection=selection))
    bounds, wide = bounds_of(selection), [t.double() for t in taus]
    want, plain = pcb.pcb(wide, bounds), pcb.pcb(taus, bounds)
    shares = torch.zeros_like(want)
    for e in range(k):
        cut, top = bounds.cut[e], bounds.top[e]
        shares += (pcb.scores(wide, e, bounds).clamp(cut, top) - cut) / (top - cut)
    counts = shares > 1e-3
    assert float(counts.float().mean()) > 0.005

    def error(x: Tensor) -> float:
        return float(((x.double() - want).abs() * counts).max())

    ulp = 2**-23 * max(selection.top_threshold)
    assert error(out) <= error(plain) + ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_everywhere(dtype: torch.dtype) -> None:
    n, k = 70_001, 5
    g = torch.Generator().manual_seed(2)
    base = torch.randn(n, generator=g).to(dtype)
    experts = [(base.float() + 0.1 * torch.randn(n, generator=g)).to(dtype) for _ in range(k)]
    recipe, results = recipe_of(k, scale=1.2), []
    for isa, threads in itertools.product(isas(), (1, 2, 3)):
        backend, out = NativeBackend(isa=isa, threads=threads), torch.empty(n, dtype=dtype)
        results.append((backend.select(Job(base, experts, recipe)), out))
        backend.merge(Job(base, experts, recipe, out))
    for selection, out in results[1:]:
        assert selection == results[0][0]
        assert torch.equal(out, results[0][1])


@pytest.mark.parametrize("step", [1_000, 65_536, 200_000])
def test_in_pieces(step: int) -> None:
    """Several tensors ranked as one, fed in pieces: what one call finds of all of them."""
    taus = vectors(150_000, 4)
    recipe = recipe_of(4)
    want = NativeBackend().select(Job(None, taus, recipe))
    search = StreamingSelect(recipe, 150_000)
    while ranges := search.wants():
        for start, stop in ranges:
            for at in range(start, stop, step):
                part = slice(at, min(at + step, stop))
                search.feed(None, [t[part] for t in taus], offset=at)
    found = search.result()
    names = ("threshold", "top_threshold", "score_cut", "score_top")
    assert all(getattr(found, n) == getattr(want, n) for n in names)
    whole, parts = torch.empty(150_000), torch.empty(150_000)
    NativeBackend().merge(Job(None, taus, recipe, whole))
    for start in range(0, 150_000, 40_000):
        part = slice(start, start + 40_000)
        own = cut_for(found, start, len(parts[part]))
        pieces = [t[part] for t in taus]
        NativeBackend().merge(Job(None, pieces, recipe, parts[part], selection=own, offset=start,
                                  total=150_000))  # fmt: skip
    assert torch.equal(whole, parts)


def test_corners() -> None:
    backend = NativeBackend()
    zero = torch.zeros(100)
    out = torch.ones(100)
    backend.merge(Job(None, [zero, zero], recipe_of(2), out))  # no score above another
    assert not out.any()
    same = torch.full((100,), 0.5)  # minmax of a constant: 0, and one score
    backend.merge(Job(None, [same], recipe_of(1), out))
    assert not out.any()
    empty = torch.empty(0, 3)
    found = backend.select(Job(None, [empty], recipe_of(1)))
    assert (found.score_cut, found.score_top) == ((0.0,), (0.0,))
    backend.merge(Job(None, [empty], recipe_of(1), torch.empty(0, 3)))
    # large changes: tanh is 1, squares are beyond float32
    far = [torch.tensor([1e30, -1e30, 1.0, 2.0]), torch.tensor([1e30, 1e30, 1.0, -2.0])]
    result = torch.empty(4)
    backend.merge(Job(None, far, recipe_of(2), result))
    want = reference.combine(None, far, recipe_of(2), reference.decide(None, far, recipe_of(2)))
    torch.testing.assert_close(result, want, rtol=1e-6, atol=0)


def test_nan_is_found_and_passes() -> None:
    taus = vectors(1_000, 2)
    taus[1][333] = math.nan
    out = torch.empty(1_000)
    stats = NativeBackend().merge(Job(None, taus, recipe_of(2), out))
    assert stats.first_nonfinite == (-1, 333)
    assert bool(out[333].isnan()) and int(out.isnan().sum()) == 1


def test_more_experts_than_it_counts() -> None:
    taus = vectors(50, 65)
    reason = NativeBackend().supports(Job(None, taus, recipe_of(65)))
    assert reason == "it counts the scores of up to 64 experts, not more"
    # e^65 and more: the scores are held over e^K, so none overflows
    many = vectors(50, 100)
    decisions = reference.decide(None, many, recipe_of(100))
    assert bool(reference.combine(None, many, recipe_of(100), decisions).isfinite().all())


def test_ties_are_one_value() -> None:
    """Equal entries of equal experts have equal scores, so a cut among them cuts none of them."""
    values = np.repeat(np.array([0.0, 0.25, -0.25, 1.0], dtype=np.float32), 25)
    tau = torch.from_numpy(values)
    out = torch.empty(100)
    recipe = recipe_of(3, ratio=0.5)
    selection = NativeBackend().select(Job(None, [tau] * 3, recipe))
    NativeBackend().merge(
        Job(None, [tau] * 3, replace(recipe, scale=1.0), out, selection=selection)
    )
    for start in range(0, 100, 25):
        assert len(set(out[start : start + 25].tolist())) == 1

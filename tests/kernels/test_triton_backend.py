"""What is the Triton backend's own: small tensors together, random words, workspace, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from magic_fast import ops
from magic_fast.errors import BackendError, NonFiniteError
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe, RowCalibration, Trim, TrimRule, Vote
from magic_fast.reference.philox import philox_words

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
random_words = pytest.importorskip("magic_fast.kernels.philox").random_words


@triton.jit
def _draw(out, first, stream, seed, ALIGNED: tl.constexpr):
    words = random_words(tl.load(first), tl.load(stream), tl.load(seed), 8, 8, ALIGNED)
    at = tl.arange(0, 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + at, words.to(tl.int64))


def _jobs(count: int, recipe: Recipe) -> list[Job]:
    g = torch.Generator().manual_seed(0)
    jobs = []
    for i in range(count):
        n = 4096 if i == 2 else 1 + 977 * i % 5000
        dtype = torch.bfloat16 if i % 3 else torch.float32
        base = torch.randn(n, generator=g).to(dtype)
        experts = [base + (torch.randn(n, generator=g) / 8).to(dtype) for _ in recipe.weights]
        jobs.append(Job(base, experts, recipe, torch.empty(n, dtype=dtype), f"layers.{i}.bias"))
    return jobs


_DARE = Recipe((1.0, 0.5), trim=Trim(TrimRule.RANDOM, density=(0.5, 1.0), seed=3))


@pytest.mark.parametrize("recipe", [Recipe((0.4, 0.6)), _DARE], ids=["sum", "random"])
def test_small_tensors_together_are_what_they_are_alone(recipe: Recipe) -> None:
    jobs = _jobs(7, recipe)
    alone = [replace(job, out=torch.empty_like(job.out)) for job in jobs]
    stats = ops.merge(jobs, backend="triton")
    for job, one, found in zip(jobs, alone, stats, strict=True):
        (single,) = ops.merge([one], backend="triton")
        assert torch.equal(job.out, one.out)
        assert found.kept == single.kept


def test_a_bad_small_tensor_is_named() -> None:
    jobs = _jobs(5, Recipe((0.4, 0.6)))
    jobs[3].experts[1][17] = math.nan
    with pytest.raises(NonFiniteError, match=r"expert 1 for 'layers\.3\.bias'.*flat index 17"):
        ops.merge(jobs, backend="triton")


@pytest.mark.parametrize("aligned", [True, False])
def test_random_words_are_philox(aligned: bool) -> None:
    first = 2**33 + (4 if aligned else 5)
    seed, stream = 2**63 + 12345, 0x9E3779B97F4A7C15
    host = [torch.tensor([x - 2**64 if x >= 2**63 else x]) for x in (first, stream, seed)]
    out = torch.empty(64, dtype=torch.int64)
    _draw[(1,)](out, *host, aligned)
    counters = torch.arange(first // 4, first // 4 + 20)
    wanted = philox_words(counters, stream - 2**64, seed).flatten()[first % 4 :][:64]
    assert torch.equal(out, wanted)


def test_slabs_of_a_calibrated_row_and_long_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of one program and the same row in two passes: within rounding of each other."""
    from magic_fast.kernels import launch

    g = torch.Generator().manual_seed(1)
    base = torch.randn(3, 4000, generator=g)
    experts = [base + torch.randn(3, 4000, generator=g) / 50 for _ in range(3)]
    recipe = Recipe((1.0,) * 3, trim=Trim(TrimRule.MAGNITUDE, density=(0.3,) * 3), vote=Vote.MASS)
    rows = RowCalibration(3, 4000)
    results = []
    for fits in (True, False):
        if not fits:
            monkeypatch.setattr(launch, "row_shape", lambda *_: None)
        job = Job(base, experts, recipe, torch.empty_like(base), calibration=rows)
        (stats,) = ops.merge([job], backend="triton")
        results.append((job.out, stats))
    (fused, one), (long, two) = results
    torch.testing.assert_close(fused, long, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.coefficient, two.coefficient, rtol=1e-6, atol=0)
    assert one.kept == two.kept


def test_workspace_can_be_asked_for() -> None:
    from magic_fast.ops.triton.backend import TritonBackend

    base = torch.zeros(64, 1024, dtype=torch.bfloat16)
    trim = Trim(TrimRule.MAGNITUDE, density=(0.2,) * 4)
    plain = Job(base, [base] * 4, Recipe((1.0,) * 4), torch.empty_like(base))
    trimmed = replace(plain, recipe=Recipe((1.0,) * 4, trim=trim))
    backend = TritonBackend()
    assert 0 < backend.workspace_bytes(plain) < backend.workspace_bytes(trimmed) < 64 << 20


def test_refusals_name_what_is_wrong() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"triton: it takes float32, float16 and bfloat16"):
        ops.merge([Job(None, [x], Recipe((1.0,)), torch.empty_like(x))], backend="triton")
    y = torch.zeros(4, 3)
    many = Job(None, [y] * 65, Recipe((1.0,) * 65), torch.empty_like(y))
    with pytest.raises(BackendError, match=r"triton: it takes up to 64 experts, not 65"):
        ops.merge([many], backend="triton")


@pytest.mark.parametrize("rows", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_as_many_as_64_experts(rows: int) -> None:
    """And, calibrated, the Gram matrix of 64 in tiles."""
    g = torch.Generator().manual_seed(2)
    base = torch.randint(-4, 5, (9, 20), generator=g) / 8
    experts = [base + torch.randint(-4, 5, (9, 20), generator=g) / 8 for _ in range(64)]
    recipe = Recipe((1.0,) * 64, vote=Vote.MASS)
    outs = []
    for backend in ("triton", "torch"):
        job = Job(base, experts, recipe, torch.empty_like(base))
        job.calibration = RowCalibration(1, 180, axes=()) if rows else None
        ops.merge([job], backend=backend)
        outs.append(job.out)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)


def test_the_interpreter_never_runs_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    from magic_fast.ops.triton.backend import interpreted

    if not interpreted():
        pytest.skip("a GPU is here")
    monkeypatch.delenv("MAGIC_FAST_BACKEND", raising=False)
    x = torch.zeros(2, 3)
    (stats,) = ops.merge([Job(None, [x], Recipe((1.0,)), torch.empty_like(x))])
    assert stats.backend != "triton"


def test_autotune_takes_the_quickest_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from magic_fast.kernels import launch

    job = replace(_jobs(1, _DARE)[0], name="w")
    ops.merge([job], backend="triton")
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setenv("MAGIC_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "measured", lambda run: (run(), next(times))[1])
    monkeypatch.setattr(launch, "_tuned", {})
    again = replace(job, out=torch.empty_like(job.out))
    ops.merge([again], backend="triton")
    assert [shape.warps for shape in launch._tuned.values()] == [4]
    assert torch.equal(again.out, job.out)

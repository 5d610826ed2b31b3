"""Random recipes, shapes, dtypes and calibrations: native against the reference, and against itself
on every instruction set and number of threads."""

from __future__ import annotations

import pytest
import torch

from magic_fast import _native
from magic_fast.ops.native.backend import NativeBackend
from magic_fast.ops.torch.backend import TorchBackend
from magic_fast.recipe import RowCalibration
from native.native_cases import bits, random_case

ISAS = list(_native.build_config()["supported_isas"])
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2e-6}


@pytest.mark.parametrize("seed", range(150))
def test_reference(seed: int) -> None:
    case = random_case(seed)
    want, got = case.job(), case.job()
    expected, found = TorchBackend().merge(want), NativeBackend().merge(got)
    a, b = expected.selection, found.selection
    assert (a.threshold, a.tie_cut) == (b.threshold, b.tie_cut)
    assert (a.top_threshold, a.top_tie_cut, a.majority) == (
        b.top_threshold,
        b.top_tie_cut,
        b.majority,
    )
    assert b.factor == pytest.approx(a.factor, rel=2.0**-23)  # one rounding of float64 sums
    assert found.kept == expected.kept
    assert found.first_nonfinite == expected.first_nonfinite
    assert found.overflow == expected.overflow
    x, y = want.out.double(), got.out.double()
    largest = float(x.abs().nan_to_num().max()) if x.numel() else 1.0
    # one step of the output, and float32 sums of up to 17 terms in between
    close = torch.isclose(
        x, y, rtol=1.01 * STEP[case.out_dtype], atol=1e-6 * largest, equal_nan=True
    )
    assert bool(close.all())
    if case.calibration is not None:
        u = torch.as_tensor(expected.coefficient).double()
        v = torch.tensor(list(found.coefficient)).double()
        assert torch.allclose(u, v, rtol=1e-4, equal_nan=True)  # float32 row sums, twice
        assert list(found.extra["repaired"]) == [int(r) for r in expected.extra["repaired"]]


@pytest.mark.parametrize("seed", range(150, 250))
def test_same_bits_on_every_instruction_set(seed: int) -> None:
    case = random_case(seed)
    first = None
    for isa in ISAS:
        job = case.job()
        stats = NativeBackend(isa=isa).merge(job)
        found = (
            stats.selection,
            stats.kept,
            None if stats.coefficient is None else bytes(stats.coefficient),
        )
        if first is None:
            first, out = found, job.out
        assert found == first
        assert torch.equal(bits(job.out), bits(out)), isa


@pytest.mark.parametrize("seed", range(300, 330))
def test_same_bits_for_any_number_of_threads(seed: int) -> None:
    case = random_case(seed, shape=(210, 1000))  # several blocks, so that threads share a tensor
    job = case.job()
    stats = NativeBackend(threads=1).merge(job)
    for threads in (2, 3, 7):
        again = case.job()
        found = NativeBackend(threads=threads).merge(again)
        assert found.selection == stats.selection and found.kept == stats.kept
        if stats.coefficient is not None:
            assert bytes(found.coefficient) == bytes(stats.coefficient)
            assert bytes(found.extra["norms2"]) == bytes(stats.extra["norms2"])
        assert torch.equal(bits(again.out), bits(job.out)), threads


def test_one_call_or_many() -> None:
    cases = [random_case(seed) for seed in range(400, 460)]
    together, alone = [c.job() for c in cases], [c.job() for c in cases]
    found = NativeBackend().merge_many(together)
    for job, other, stats in zip(together, alone, found, strict=True):
        expected = NativeBackend().merge(other)
        assert (stats.selection, stats.kept) == (expected.selection, expected.kept)
        assert torch.equal(bits(job.out), bits(other.out))


def test_rows_longer_than_the_cache() -> None:
    """Rows above 2^20 elements are read twice instead of kept."""
    case = random_case(7, shape=(2, (1 << 20) + 4099))
    case.calibration = RowCalibration(2, (1 << 20) + 4099)
    jobs = [case.job() for _ in range(3)]
    stats = [NativeBackend(threads=t).merge(j) for t, j in zip((1, 2, 3), jobs, strict=True)]
    want = case.job()
    expected = TorchBackend().merge(want)
    for job, found in zip(jobs, stats, strict=True):
        assert torch.equal(bits(job.out), bits(jobs[0].out))
        assert found.kept == expected.kept
        assert list(found.coefficient) == pytest.approx(expected.coefficient.tolist(), rel=1e-4)

"""What only a device shows: streams, graphs, more than 2^31 elements, memory, whole checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magic_fast import ops
from magic_fast.ops.job import Job
from magic_fast.ops.registry import implementation, why_unavailable
from magic_fast.recipe import Recipe, RowCalibration, Trim, TrimRule, Vote

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = why_unavailable(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    yield request.param


def ties(k: int, density: float = 0.2) -> Recipe:
    trim = Trim(TrimRule.MAGNITUDE, (density,) * k)
    return Recipe((1.0,) * k, trim=trim, vote=Vote.MASS)


def job(rows: int, cols: int, k: int, recipe: Recipe, seed: int = 0, wsc: bool = True) -> Job:
    draw = torch.Generator("cuda").manual_seed(seed)
    base = torch.randn((rows, cols), generator=draw, device="cuda")
    experts = [
        (base + 0.01 * torch.randn((rows, cols), generator=draw, device="cuda")).bfloat16()
        for _ in range(k)
    ]
    calibration = RowCalibration(rows, cols) if wsc else None
    base = base.bfloat16()
    return Job(base, experts, recipe, torch.empty_like(base), "w", calibration=calibration)


@pytest.mark.parametrize("k", [3, 8])
def test_the_same_bits_on_every_stream_and_run(backend: str, k: int) -> None:
    one = job(512, 4096, k, ties(k))
    ops.merge([one], backend=backend)
    want = one.out.clone()
    streams = [torch.cuda.Stream() for _ in range(4)]
    outs = []
    torch.cuda.synchronize()
    for n in range(12):
        again = replace(one, out=torch.empty_like(want))
        with torch.cuda.stream(streams[n % 4]):
            ops.merge([again], backend=backend)
        outs.append(again.out)
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_decisions_are_those_of_the_cpu(backend: str) -> None:
    """Threshold, cut, counts of a tensor that no sample holds, against the reference on the CPU."""
    one = job(1024, 5003, 3, ties(3), wsc=False)
    (mine,) = ops.merge([one], backend=backend)
    there = replace(
        one, base=one.base.cpu(), experts=[e.cpu() for e in one.experts], out=one.out.cpu()
    )
    (want,) = ops.merge([there], backend="torch")
    assert mine.selection.threshold == want.selection.threshold
    assert mine.kept == want.kept
    assert torch.equal(one.out.cpu(), there.out)


@pytest.mark.parametrize("wsc", [False, True])
def test_a_graph_replays_it(backend: str, wsc: bool) -> None:
    one = job(256, 2048, 4, ties(4) if backend == "cuda" else Recipe((0.3,) * 4), wsc=wsc)
    runs = implementation(backend)
    devices = runs.prepare([one])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        runs.launch(devices)  # compiles and warms up
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runs.launch(devices)
    other = job(256, 2048, 4, one.recipe, seed=1, wsc=wsc)
    for mine, new in zip((one.base, *one.experts), (other.base, *other.experts), strict=True):
        mine.copy_(new)
    graph.replay()
    ops.merge([other], backend=backend)
    torch.cuda.synchronize()
    assert torch.equal(one.out, other.out)


def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """The last elements decide: indices and counts beyond 32 bits."""
    n = (1 << 31) + 4096 + 3
    if torch.cuda.mem_get_info()[0] < 8 * n:
        pytest.skip(f"needs {8 * n >> 30} GiB of the device")
    x = torch.full((n,), 0.5, dtype=torch.bfloat16, device="cuda")
    x[-1000:] = 2.0
    x[-500:] = -2.0
    trim = Trim(TrimRule.MAGNITUDE, (750.5 / n,))
    one = Job(None, [x], Recipe((3.0,), trim=trim), torch.empty_like(x), "w")
    (stats,) = ops.merge([one], backend=backend)
    assert stats.kept == (750,)
    assert stats.selection.threshold == (2.0,) and stats.selection.tie_cut == (n - 250,)
    assert int(torch.count_nonzero(one.out[: n - 1000])) == 0
    assert one.out[-1000:-500].unique().tolist() == [6.0]
    assert one.out[-500:-250].unique().tolist() == [-6.0]
    assert int(torch.count_nonzero(one.out[-250:])) == 0


@pytest.mark.parametrize("k", [3, 8, 16])
@pytest.mark.parametrize("wsc", [False, True])
def test_workspace_is_what_is_said(backend: str, k: int, wsc: bool) -> None:
    one = job(4096, 4096, k, ties(k), wsc=wsc)
    ops.merge([one], backend=backend)  # what is loaded once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.merge([one], backend=backend)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 64 << 20
    assert taken <= implementation(backend).workspace_bytes(one) + (2 << 20)


def test_nan_is_named(backend: str) -> None:
    one = job(300, 1001, 3, ties(3))
    one.experts[1].view(-1)[[200_000, 777]] = float("nan")
    (stats,) = ops.merge([one], backend=backend, nonfinite="propagate")
    assert stats.first_nonfinite == (-1, 777, -1) and stats.base_nonfinite == -1


@pytest.mark.parametrize("method", ["ties", "iso_c"])
def test_checkpoints_through_the_device(method: str, tmp_path: Path) -> None:
    """The engine's copies and kernels overlap: the bits of the merge with everything in memory."""
    pytest.importorskip("pydantic", reason="configurations need pydantic")
    import magic_fast as mf
    from engine.engine_models import MIB, Models, different, read_out

    models = Models(tmp_path / "m")
    parameters = {"density": 0.3, "weight": 0.7} if method == "ties" else {}
    config = models.config(method, parameters=parameters, calibrate="wsc")
    for memory in (32 * MIB, 64 * MIB):
        mf.merge_checkpoints(config, tmp_path / str(memory), device="cuda", memory=memory)
    first, second = (read_out(tmp_path / str(m)) for m in (32 * MIB, 64 * MIB))
    assert different(first, second) == []
    cuda = [{n: t.cuda() for n, t in m.items()} for m in (models.base, *models.experts)]
    keys = {"weights" if k == "weight" else k: v for k, v in parameters.items()}
    merged = mf.merge(cuda[0], cuda[1:], method, calibrate="wsc", preset="mergekit", **keys)
    assert different(first, {n: t.cpu() for n, t in merged.items()}) == []

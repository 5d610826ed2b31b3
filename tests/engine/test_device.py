"""Runs on devices, with devices that are late: the bits of the merge in memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, SHAPES, Models, different, read_out
from engine.fake_device import FakeLane
from engine.hashing import hashes
from magic_fast.engine.gpu import lanes as device
from magic_fast.engine.gpu.arena import arena_of
from magic_fast.engine.gpu.lanes import Share
from magic_fast.engine.plan.units import Piece

B, H, F = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    extra = {"model.layers.0.position_ids": torch.arange(700).view(1, -1)}
    return Models(
        tmp_path_factory.mktemp("m") / "m", SHAPES, ((F, B), (B,), (H, F), (F, H, B)), extra
    )


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[FakeLane]:
    """Two devices in the place of ``cuda``."""
    found = [FakeLane("cuda:0"), FakeLane("cuda:1")]
    monkeypatch.setattr(device, "lanes_of", lambda name: found)
    for module in ("merge", "calibrate", "sweep"):
        monkeypatch.setattr(f"magic_fast.api.checkpoints.{module}.device_of", lambda name: name)
    return found


def run(config: str, out: Path, backend: str | None = "torch", **options: Any) -> Any:
    return mf.merge_checkpoints(config, out, device="cuda", backend=backend, **options)


CASES: dict[str, dict[str, Any]] = {
    "ties": {"weight": 0.7, "density": 0.3},
    "dare_ties": {"weight": 0.7, "density": 0.3, "rescale": "l1"},
    "della": {"weight": 0.7, "density": 0.5, "epsilon": 0.2},
    "task_arithmetic": {"weight": 0.4},
    "linear": {"weight": 0.25},
}


@pytest.mark.parametrize("method", CASES)
def test_staged_is_in_memory(
    models: Models, lanes: list[FakeLane], method: str, tmp_path: Path
) -> None:
    parameters = CASES[method]
    calibrate = None if method == "linear" else "wsc"
    config = models.config(
        method, parameters=parameters, **({"calibrate": calibrate} if calibrate else {})
    )
    renamed = {("weights" if k == "weight" else k): v for k, v in parameters.items()}
    want = models.merged(method, calibrate=calibrate, backend="torch", **renamed)
    for memory in (4 * MIB, 9 * MIB + 13):
        report = run(config, tmp_path / str(memory), memory=memory)
        assert different(read_out(tmp_path / str(memory)), want) == []
        assert report.backend == "torch"
    assert all(lane.uploaded for lane in lanes), "both devices work"
    assert all(len(lane.threads) == 1 for lane in lanes), "each in a thread of its own"
    assert not FakeLane.pinned, "what was locked is unlocked"


@pytest.mark.parametrize("method", ["model_stock", "iso_c", "karcher"])
def test_methods_that_are_no_recipe(
    models: Models, lanes: list[FakeLane], method: str, tmp_path: Path
) -> None:
    config = models.config(method)
    run(config, tmp_path / "a", backend=None, memory=4 * MIB)
    mf.merge_checkpoints(config, tmp_path / "b", device="cpu", backend=None)
    assert different(read_out(tmp_path / "a"), read_out(tmp_path / "b")) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_the_configuration(
    models: Models, lanes: list[FakeLane], dtype: str, tmp_path: Path
) -> None:
    config = models.config("ties", parameters=CASES["ties"], dtype=dtype, out_dtype="float16")
    run(config, tmp_path / "out", memory=4 * MIB)
    want = models.merged(
        "ties", dtype=dtype, out_dtype="float16", weights=0.7, density=0.3, backend="torch"
    )
    assert different(read_out(tmp_path / "out"), want) == []


def test_thresholds_over_the_whole_model(
    models: Models, lanes: list[FakeLane], tmp_path: Path
) -> None:
    fields = {"parameters": {"density": 0.2, "weight": 0.5}, "preset": "ties_merging"}
    config = models.config("ties", **fields)
    run(config, tmp_path / "out", memory=4 * MIB)
    want = models.merged("ties", preset="ties_merging", density=0.2, weights=0.5, backend="torch")
    assert different(read_out(tmp_path / "out"), want) == []


def test_calibrating_a_model_merged_elsewhere(
    models: Models, lanes: list[FakeLane], tmp_path: Path
) -> None:
    mf.merge_checkpoints(models.config("average"), tmp_path / "merged", device="cpu")
    experts = [models.folder / f"expert-{k}" for k in range(3)]
    for name, where in (("gpu", "cuda"), ("cpu", "cpu")):
        mf.calibrate_checkpoints(
            models.folder / "base", experts, tmp_path / "merged", tmp_path / name,
            device=where, backend="torch",
        )  # fmt: skip
    assert read_out(tmp_path / "gpu").keys() == read_out(tmp_path / "cpu").keys()
    assert different(read_out(tmp_path / "gpu"), read_out(tmp_path / "cpu")) == []


def test_a_unit_without_a_byte(lanes: list[FakeLane], tmp_path: Path) -> None:
    models = Models(tmp_path / "m", {"a.weight": (0, 8), "b.weight": (0,)})
    run(models.config("average"), tmp_path / "out")
    assert {n: tuple(t.shape) for n, t in read_out(tmp_path / "out").items()} == {
        "a.weight": (0, 8),
        "b.weight": (0,),
    }


def test_a_device_that_is_too_small(models: Models, lanes: list[FakeLane], tmp_path: Path) -> None:
    lanes[1]._free = 4 * MIB
    with pytest.raises(mf.InputError, match=r"not enough memory on cuda:1 for tensor .*Pass --dev"):
        run(models.config("average"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tight_device_takes_units_one_by_one(
    models: Models, lanes: list[FakeLane], tmp_path: Path
) -> None:
    for lane in lanes:
        lane._free = 24 * MIB
    run(models.config("average"), tmp_path / "out", memory=4 * MIB)
    want = models.merged("average", backend="torch")
    assert different(read_out(tmp_path / "out"), want) == []


def test_resumed(models: Models, lanes: list[FakeLane], tmp_path: Path) -> None:
    config = models.config("ties", parameters=CASES["ties"], calibrate="wsc")
    run(config, tmp_path / "whole" / "out", memory=4 * MIB)
    seen = []

    def stop(progress: mf.api.Progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "out", memory=4 * MIB, progress=stop)
    before = sum(lane.uploaded for lane in lanes)
    run(config, tmp_path / "out", memory=4 * MIB, resume=True, nonfinite="error")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole" / "out")
    assert sum(lane.uploaded for lane in lanes) - before < before, "something was taken over"


def test_nan_is_found_and_named(lanes: list[FakeLane], tmp_path: Path) -> None:
    models = Models(tmp_path / "m", {"a.weight": (64, 300), "b.weight": (9, 70)})
    path = models.folder / "expert-1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"  # the last element of the last tensor
    path.write_bytes(data)
    with pytest.raises(mf.NonFiniteError, match=r"b\.weight.*629"):
        run(models.config("average"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = run(models.config("average"), tmp_path / "out", nonfinite="propagate")
    assert {t.name: t.nonfinite for t in report.tensors} == {"a.weight": 0, "b.weight": 1}


@pytest.mark.parametrize("way", ["merge", "sweep", "calibrate"])
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("vulkan", "backend 'vulkan': expected one of 'native', 'cuda', 'triton', 'torch'"),
        ("native", "backend 'native': expected one that can run on cuda, got: the tensors are on"),
    ],
)
def test_a_backend_that_is_asked_for_is_never_replaced(
    models: Models, lanes: list[FakeLane], way: str, backend: str, message: str, tmp_path: Path
) -> None:
    config, out = models.config("average"), tmp_path / "out"
    experts = [models.folder / f"expert-{k}" for k in range(3)]
    calls = {
        "merge": lambda: run(config, out, backend),
        "sweep": lambda: mf.sweep_checkpoints(
            config, out, {"scale": [1.0, 2.0]}, device="cuda", backend=backend
        ),
        "calibrate": lambda: mf.calibrate_checkpoints(
            models.folder / "base", experts, experts[0], out, device="cuda", backend=backend
        ),
    }
    with pytest.raises(mf.BackendError, match=message):
        calls[way]()
    assert not out.exists()


def test_integers_must_agree(lanes: list[FakeLane], tmp_path: Path) -> None:
    models = Models(tmp_path / "m", {"w": (8, 8)}, extra={"ids": torch.arange(5)})
    path = models.folder / "expert-0" / "model.safetensors"
    data = path.read_bytes()
    at = data.rindex((4).to_bytes(8, "little"))
    path.write_bytes(data[:at] + (9).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(mf.InputError, match="integer tensor 'ids'"):
        run(models.config("average"), tmp_path / "out")


def test_what_waits_for_nothing_is_seen(
    models: Models, lanes: list[FakeLane], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake finds a forgotten wait: without the mark of the uploads the result is another."""
    merging = FakeLane.merging
    passed = threading.Event()
    passed.set()
    for lane in lanes:  # later than a busy machine is
        monkeypatch.setattr(lane, "_late", 0.1)
    monkeypatch.setattr(FakeLane, "merging", lambda self, after: merging(self, passed))
    run(models.config("average"), tmp_path / "out", memory=4 * MIB, nonfinite="propagate")
    want = models.merged("average", backend="torch")
    assert different(read_out(tmp_path / "out"), want)


def test_chunks_cover_every_byte_once(models: Models, tmp_path: Path) -> None:
    plan = mf.plan_checkpoints(models.config("average"), tmp_path / "out")
    pieces = [Piece(s, 0, s.numel) for s in plan.steps]
    arena = arena_of(pieces)
    for size in (64, 4096, 1 << 20, 1 << 30):
        seen: dict[int, int] = {}
        for start, parts in arena.chunks(size):
            for area, first, place, nbytes in parts:
                assert area.start + first == start + place and place + nbytes <= size
                assert seen.get(id(area), 0) == first
                seen[id(area)] = first + nbytes
        areas = [a for row in arena.inputs for a in row if a.nbytes]
        assert [seen[id(a)] for a in areas] == [a.nbytes for a in areas]
    assert len({a.start for a in arena.outputs if a.nbytes}) == sum(
        a.nbytes > 0 for a in arena.outputs
    )


def test_devices_share_by_bytes() -> None:
    share = Share([FakeLane(), FakeLane()])
    assert [share.next(n) for n in (100, 10, 10, 70, 20, 1)] == [0, 1, 1, 1, 1, 0]

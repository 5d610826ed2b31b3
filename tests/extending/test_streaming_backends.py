"""The engine streams on any backend that declares it. Here the native core stands under another
name, and the one of its own name cannot run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, Models, different, read_out
from magic_fast.ops import registry
from magic_fast.ops.native.backend import NativeBackend
from support.backends import available_backends

pytestmark = pytest.mark.skipif(
    "native" not in available_backends(), reason="its core is what streams here"
)
B, F = torch.bfloat16, torch.float32


class Other(NativeBackend):
    name = "other"

    def why_not(self) -> str | None:
        return None


class Plain:
    """What is required, and borrowed memory: no capability beside."""

    name = "plain"

    def __init__(self) -> None:
        core = NativeBackend()
        self.supports, self.select, self.merge = core.supports, core.select, core.merge

    def why_not(self) -> str | None:
        return None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    extra = {"position_ids": torch.arange(9)}
    return Models(tmp_path_factory.mktemp("models"), dtypes=((B,), (B, F), (B,), (F,)), extra=extra)


@pytest.fixture
def no_native(own_registry: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the backend of that name cannot run; the two others can all the time."""
    mf.register_backend("other", Other, devices=("cpu",), streams=True, before="torch")
    mf.register_backend("plain", Plain, devices=("cpu",), streams=True)

    def forbid() -> None:
        monkeypatch.setattr(NativeBackend, "why_not", lambda self: "forbidden here")
        registry.loaded.cache_clear()

    return forbid


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ties": ("ties", {"parameters": {"density": 0.3}}),
    "ties, whole model": ("ties", {"parameters": {"density": 0.3}, "preset": "ties_merging"}),
    "norms": ("ties", {"parameters": {"density": 0.3, "rescale": "l2"}}),
    "calibrated": ("ties", {"parameters": {"density": 0.3}, "calibrate": "wsc"}),
    "random": ("dare_ties", {"parameters": {"density": 0.3, "rescale": False}}),
    "scores": ("pcb", {"parameters": {"ratio": 0.2}}),
    "rounded first": ("task_arithmetic", {"dtype": "bfloat16"}),
    "a mean of directions": ("karcher", {}),
}


def merge(config: str, out: Path, backend: str | None, memory: int) -> Any:
    report = mf.merge_checkpoints(config, out, backend=backend, memory=memory, device="cpu")
    return report, read_out(out)


@pytest.mark.parametrize("memory", [4 * MIB, 64 * MIB])
@pytest.mark.parametrize("case", CASES)
def test_every_capability(
    models: Models, tmp_path: Path, no_native: Any, case: str, memory: int
) -> None:
    method, fields = CASES[case]
    config = models.config(method, **fields)
    _, want = merge(config, tmp_path / "native", "native", memory)
    no_native()
    for backend in ("other", None):  # by name, and as the first that can run
        plan = mf.plan_checkpoints(config, tmp_path / "no", backend=backend, memory=memory)
        assert {way.backend for way in plan.budget.modes.values()} == {"other"}
        report, got = merge(config, tmp_path / str(backend), backend, memory)
        assert report.backend == "other"
        assert different(got, want) == []


@pytest.mark.parametrize("case", CASES)
def test_no_capability(models: Models, tmp_path: Path, no_native: Any, case: str) -> None:
    """Large tensors are held whole where it cannot search them; thresholds of the whole model and
    calibrations of rows are found all the same."""
    method, fields = CASES[case]
    config = models.config(method, **fields)
    _, want = merge(config, tmp_path / "native", "native", 4 * MIB)
    no_native()
    plan = mf.plan_checkpoints(config, tmp_path / "no", backend="plain", memory=4 * MIB)
    ways = {(way.mode.value, way.why) for way in plan.budget.modes.values()}
    if case in ("ties, whole model", "scores"):
        assert ("torch", "backend plain looks for thresholds in single tensors") in ways
    elif case in ("random", "rounded first"):
        assert ways == {("stream", "")}
    elif case == "a mean of directions":
        assert ("hold", "its coefficients follow from all of the tensor") in ways
    else:
        assert ("hold", "backend plain looks for thresholds in whole tensors") in ways
    report, got = merge(config, tmp_path / "plain", "plain", 4 * MIB)
    assert report.backend == "plain"
    assert different(got, want) == []


def test_a_model_merged_elsewhere(models: Models, tmp_path: Path, no_native: Any) -> None:
    """``calibrate`` is a capability."""
    names = [str(models.folder / f"expert-{k}") for k in range(3)]
    base, merged = str(models.folder / "base"), str(models.folder / "expert-2")

    def run(backend: str | None) -> Any:
        out = tmp_path / str(backend)
        report = mf.calibrate_checkpoints(
            base, names[:2], merged, out, backend=backend, memory=4 * MIB, device="cpu"
        )
        return report.backend, read_out(out)

    _, want = run("native")
    no_native()
    backend, got = run("other")
    assert backend == "other" and different(got, want) == []
    with pytest.raises(mf.BackendError, match="plain: it has no calibrate"):
        run("plain")


def test_sweeps_share_where_merges_split(
    models: Models, tmp_path: Path, no_native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from magic_fast.engine.execute import sweep as engine_sweep

    shared: list[str] = []
    own = engine_sweep.merge_scales

    def counted(jobs: Any, known: Any, backend: str) -> Any:
        shared.append(backend)
        return own(jobs, known, backend)

    monkeypatch.setattr(engine_sweep, "merge_scales", counted)
    config, settings = models.config("ties"), {"density": [0.1, 0.6], "lambda": [0.3, 1.0, 1.7]}

    def run(backend: str) -> list[dict[str, torch.Tensor]]:
        out = tmp_path / backend
        shared.clear()
        options = {"backend": backend, "memory": 4 * MIB, "device": "cpu"}
        report = mf.sweep_checkpoints(config, out, settings, **options)
        assert {r.backend for r in report.reports} == {backend}
        return [read_out(out / c.name) for c in report.combinations]

    want = run("native")
    assert set(shared) == {"native"}
    no_native()
    for backend, sharing in (("other", {"other"}), ("plain", set())):
        for got, one in zip(run(backend), want, strict=True):
            assert got.keys() == one.keys()
            assert all(torch.equal(got[name], one[name]) for name in one)
        assert set(shared) == sharing

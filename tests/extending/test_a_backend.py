"""A backend of others, in one file: the one of docs/contributing/add-a-backend.md, as it stands
there. No file of the package knows it."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, Models, different, environment, read_out
from extending.conftest import Blocks
from magic_fast import ops
from magic_fast.errors import BackendError, InputError
from magic_fast.ops import choice, registry
from magic_fast.recipe import Recipe
from support.cases import merge_cases
from support.oracle import assert_within_budget, truth

PAGE = "add-a-backend.md"


@pytest.fixture
def folder(tmp_path: Path, blocks_of: Blocks, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On the path; with ``numpy_backend.py`` in it."""
    (tmp_path / "numpy_backend.py").write_text(blocks_of(PAGE)[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numpy_backend", raising=False)
    return tmp_path


@pytest.fixture
def numpy_backend(own_registry: None, folder: Path) -> ModuleType:
    return importlib.import_module("numpy_backend")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    extra = {"position_ids": torch.arange(9)}
    return Models(tmp_path_factory.mktemp("models"), dtypes=((torch.float32,),) * 4, extra=extra)


def offered_by_a_package(folder: Path, entries: str) -> None:
    facts = folder / "toy-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[magic_fast.backends]\n{entries}\n")
    importlib.invalidate_caches()


def test_the_page_runs(
    numpy_backend: ModuleType, blocks_of: Blocks, models: Models, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The blocks behind the file, in their order."""
    monkeypatch.chdir(tmp_path)
    Path("ties.yml").write_text(models.config("ties", parameters={"density": 0.2}))
    draw = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(32, 48, generator=draw) for _ in range(4))
    names: dict[str, Any] = {"mf": mf, "torch": torch, "base": base, "experts": experts}
    for block in blocks_of(PAGE)[1:]:
        exec(block, names)
    assert read_out(tmp_path / "merged")


def test_cases_of_the_parity_grid(numpy_backend: ModuleType) -> None:
    """Those that it takes: values within the budget, decisions exact."""
    taken: dict[str, int] = {}
    for case in dict.fromkeys(merge_cases()):
        job = case.job()
        if numpy_backend.NumpyBackend().supports(job) is not None:
            continue
        taken[job.recipe.vote] = taken.get(job.recipe.vote, 0) + 1
        (stats,) = ops.merge([job], backend="numpy")
        wanted = truth(job)
        assert_within_budget(job.out, wanted)
        assert stats.kept == tuple(
            e.numel() if mask is None else int(mask.sum())
            for e, mask in zip(job.experts, wanted.decisions.keep, strict=True)
        )
    assert taken["none"] > 20 and taken["mass"] > 20, taken


def test_by_name_it_is_never_replaced(numpy_backend: ModuleType) -> None:
    base, *experts = torch.rand(3, 4, 5)
    with pytest.raises(BackendError, match="numpy: it takes float32 only"):
        mf.merge(base.double(), [e.double() for e in experts], "ties", backend="numpy")
    with pytest.raises(BackendError, match="numpy: it adds and runs TIES, and nothing else"):
        mf.merge(base, experts, "magmax", backend="numpy")
    with pytest.raises(BackendError, match="numpy: it has no row_stats"):
        ops.row_stats(ops.Job(base, experts, Recipe((1.0, 1.0))), base, backend="numpy")
    assert ops.merge(  # by itself the choice is as before
        [ops.Job(base, experts, Recipe((1.0, 1.0)), torch.empty(4, 5))]
    )[0].backend != "numpy"  # fmt: skip


@pytest.mark.parametrize("memory", [4 * MIB, 128 * MIB])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_checkpoints_stream(
    numpy_backend: ModuleType, models: Models, tmp_path: Path, method: str, memory: int
) -> None:
    parameters = {"density": 0.3} if method == "ties" else {"weight": 0.4}
    config = models.config(method, parameters=parameters)
    report = mf.merge_checkpoints(config, tmp_path / "out", backend="numpy", memory=memory)
    assert report.backend == "numpy"
    given = {"weights" if name == "weight" else name: v for name, v in parameters.items()}
    same = models.merged(method, backend="numpy", **given)
    assert different(read_out(tmp_path / "out"), same) == []
    for name, want in models.merged(method, backend="torch", **given).items():
        torch.testing.assert_close(same[name], want, rtol=2e-7, atol=2e-7)


def test_how_a_plan_runs(numpy_backend: ModuleType, models: Models, tmp_path: Path) -> None:
    """In pieces, but for what needs thresholds over a tensor larger than a block."""
    long = "model.layers.0.mlp.up_proj.weight"

    def ways(method: str, **parameters: float) -> dict[str, Any]:
        config = models.config(method, parameters=parameters)
        options = {"backend": "numpy", "memory": 4 * MIB}
        return mf.plan_checkpoints(config, tmp_path / "out", **options).budget.modes

    assert {tuple(way) for way in ways("task_arithmetic").values()} == {("stream", "", "numpy")}
    ties = ways("ties", density=0.2)
    why = "backend numpy looks for thresholds in whole tensors"
    assert ties[long] == ("hold", why, "numpy")
    assert ties["model.norm.weight"] == ("stream", "", "numpy")


def test_a_merge_that_it_does_not_take_is_refused(
    numpy_backend: ModuleType, models: Models, tmp_path: Path
) -> None:
    config = models.config("breadcrumbs", parameters={"density": 0.3})
    with pytest.raises(BackendError, match="numpy: it trims by magnitude only"):
        mf.merge_checkpoints(config, tmp_path / "out", backend="numpy")


def test_a_place_in_the_order(own_registry: None, folder: Path, models: Models) -> None:
    """Ahead of the others it is taken by itself, for what it supports."""
    mf.register_backend(
        "first", "numpy_backend:NumpyBackend", devices=("cpu",), streams=True, before="native"
    )
    numpy_backend = importlib.import_module("numpy_backend")
    numpy_backend.NumpyBackend.name = "first"
    plan = mf.plan_checkpoints(models.config("task_arithmetic"), folder / "out")
    assert {way.backend for way in plan.budget.modes.values()} == {"first"}
    base, *experts = torch.rand(3, 4, 5)
    job = ops.Job(base, experts, Recipe((1.0, 1.0)), torch.empty(4, 5))
    assert ops.merge([job])[0].backend == "first"
    half = ops.Job(base.half(), [e.half() for e in experts], job.recipe, torch.empty(4, 5).half())
    assert [stats.backend for stats in ops.merge([job, half, job])][::2] == ["first"] * 2
    assert choice.automatic("cpu")[0] == "first"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "torch"}, "name of a backend: expected one that is not taken, got 'torch'"),
        ({"name": "auto"}, "name of a backend: expected a word other than 'auto', got 'auto'"),
        ({"factory": "nowhere"}, "factory of backend 'toy': expected a callable or 'module:attr"),
        ({"devices": "cpu"}, r"devices of backend 'toy': expected names such as \('cpu',\), got"),
        ({"devices": ()}, "devices of backend 'toy'"),
        ({"before": "nobody"}, "before of backend 'toy': expected 'native', .*, got 'nobody'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_registration_is_checked(
    own_registry: None, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        mf.register_backend(**{"name": "toy", "factory": object, "devices": ("cpu",)} | change)
    assert "toy" not in [spec.name for spec in registry.specs()]


def test_registered_twice_it_is_there_once(own_registry: None) -> None:
    for _ in range(2):
        mf.register_backend("toy", object, devices=("cpu",))
    assert [spec.name for spec in registry.specs()].count("toy") == 1
    with pytest.raises(InputError, match="expected one that is not taken, got 'toy'"):
        mf.register_backend("toy", dict, devices=("cpu",))


def test_what_is_no_backend_says_so(own_registry: None) -> None:
    mf.register_backend("toy", object, devices=("cpu",))
    mf.register_backend("other", lambda: 1 / 0, devices=("cpu",))
    reasons = {status.name: status.reason for status in mf.backends()}
    assert reasons["toy"] == (
        "it has no name, why_not, supports, select, merge, which every backend must have"
    )
    assert reasons["other"] == "cannot be loaded: ZeroDivisionError: division by zero"


def test_a_package_offers_it(own_registry: None, folder: Path) -> None:
    """Nobody imports it."""
    offered_by_a_package(folder, "numpy = numpy_backend:SPEC")
    base, *experts = torch.rand(3, 4, 5)
    mf.merge(base, experts, "ties", density=0.5, backend="numpy")
    status = next(status for status in mf.backends() if status.name == "numpy")
    assert status.available and status.devices == ("cpu",)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("toy = toy_backend:SPEC", "toy_backend:SPEC cannot be loaded: RuntimeError: no luck"),
        ("toy = numpy_backend:count", "expected what register_backend('toy', ...) returned, got"),
        ("toy = numpy_backend:SPEC", "expected what register_backend('toy', ...) returned, got"),
    ],
)
def test_a_broken_offer_is_named(
    own_registry: None, folder: Path, caplog: pytest.LogCaptureFixture, entry: str, reason: str
) -> None:
    caplog.set_level(logging.WARNING, logger="magic_fast")
    (folder / "toy_backend.py").write_text("raise RuntimeError('no luck')")
    offered_by_a_package(folder, entry)
    status = next(status for status in mf.backends() if status.name == "toy")
    assert not status.available and status.reason is not None
    assert status.reason.startswith("the entry point is left out: ") and reason in status.reason
    assert "entry point toy of magic_fast.backends is left out" in caplog.text
    base, *experts = torch.rand(3, 4, 5)
    mf.merge(base, experts, "average")
    with pytest.raises(BackendError) as caught:
        mf.merge(base, experts, "average", backend="toy")
    assert reason in str(caught.value)


def test_commands(folder: Path, models: Models) -> None:
    """A package that offers it, in processes of their own; torch's choice is not asked for."""
    offered_by_a_package(folder, "numpy = numpy_backend:SPEC\nbad = nowhere_at_all:SPEC")
    (folder / "ties.yml").write_text(models.config("ties", parameters={"density": 0.3}))

    def run(*words: str) -> str:
        path = environment()["PYTHONPATH"]
        done = subprocess.run(
            [sys.executable, "-m", "magic_fast", *words], capture_output=True, text=True,
            cwd=folder, env=environment(PYTHONPATH=f"{folder}:{path}"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run("merge", "ties.yml", "out", "--backend", "numpy", "--device", "cpu", "--memory", "4MiB")
    want = models.merged("ties", density=0.3, backend="torch")
    for name, tensor in read_out(folder / "out").items():
        torch.testing.assert_close(tensor, want[name], rtol=2e-7, atol=2e-7)
    shown = run("doctor")
    assert "plain NumPy, float32 only" in shown
    assert "nowhere_at_all:SPEC cannot be loaded" in " ".join(shown.split())

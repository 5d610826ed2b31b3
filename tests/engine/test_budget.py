"""Tensors that must be held whole: shown by the plan, and refused where they need too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, Models
from engine.hashing import hashes
from magic_fast.cli import main
from magic_fast.engine.plan import budget
from magic_fast.engine.plan.machine import available_memory
from support.backends import available_backends

SHAPES = {"a.weight": (1024, 1024), "b.weight": (64, 48)}
# base and two experts twice, the result, four float32 copies, and eight in float64
HELD = (2 * 3 + 1 + 4) * 4 * MIB + 8 * 8 * MIB


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("m") / "m", SHAPES, ((torch.float32,),) * 3)


@pytest.fixture
def config(models: Models, tmp_path: Path) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(models.config("iso_c"))
    return path


def test_the_plan_shows_what_is_held(config: Path, tmp_path: Path) -> None:
    plan = mf.plan_checkpoints(config, tmp_path / "out", memory=128 * MIB)
    assert plan.peak_memory == HELD and plan.budget.fits
    described = plan.describe()
    assert described["held"] == {
        "tensor": "a.weight",
        "bytes": HELD,
        "why": "method iso_c looks at whole tensors",
    }
    assert described["memory_allowed_bytes"] == 128 * MIB


def test_more_than_the_user_allows(config: Path, tmp_path: Path) -> None:
    """Nothing is written; with what the message says it runs."""
    with pytest.raises(mf.InputError) as caught:
        mf.merge_checkpoints(config, tmp_path / "runs" / "out", memory=33 * MIB)
    assert str(caught.value) == (
        "not enough memory for tensor 'a.weight': expected at most 33 MiB, allowed by --memory, "
        "got 108 MiB, as it must be held whole (method iso_c looks at whole tensors). Pass "
        "--memory 108MiB or more, or choose a method that works in pieces (`magic-fast methods` "
        "tells)."
    )
    assert not (tmp_path / "runs").exists()
    mf.merge_checkpoints(config, tmp_path / "runs" / "out", memory=108 * MIB)
    mf.merge_checkpoints(config, tmp_path / "free" / "out")
    assert hashes(tmp_path / "runs" / "out") == hashes(tmp_path / "free" / "out")


def test_more_than_the_machine_has_free(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: 90 * MIB)
    with pytest.raises(mf.InputError, match="90 MiB, that are free on this machine, got 108 MiB"):
        mf.merge_checkpoints(config, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yml"]
    mf.merge_checkpoints(config, tmp_path / "out", memory=108 * MIB)  # on the user's own word
    monkeypatch.setattr(budget, "available_memory", lambda: None)
    mf.merge_checkpoints(config, tmp_path / "unknown")


@pytest.mark.skipif("native" not in available_backends(), reason="blocks are of the native backend")
def test_blocks_give_way_to_tensors_that_are_whole(models: Models, tmp_path: Path) -> None:
    """All together stays within what is allowed; the bits are the same."""
    settings = mf.WeightCalibration(granularity="tensor")
    text = models.config("task_arithmetic", parameters={"weight": 0.5})
    found = []
    for memory in (512 * MIB, 40 * MIB):
        plan = mf.plan_checkpoints(text, tmp_path / "no", memory=memory, calibrate=settings)
        assert plan.peak_memory <= memory
        found.append((plan.budget.held, plan.budget.slot_bytes))
        out = tmp_path / str(memory) / "out"
        mf.merge_checkpoints(text, out, memory=memory, calibrate=settings)
    assert found == [(0, 128 * MIB), ((2 * 3 + 1) * 4 * MIB, 3 * MIB)]
    assert hashes(tmp_path / str(512 * MIB) / "out") == hashes(tmp_path / str(40 * MIB) / "out")


def test_blocks_within_what_is_free(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: 60 * MIB)
    text = models.config("ties", parameters={"weight": 0.5, "density": 0.5})
    if "native" in available_backends():
        assert mf.plan_checkpoints(text, tmp_path / "out").peak_memory == 60 * MIB
    mf.merge_checkpoints(text, tmp_path / "out")


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_dry_run_shows_the_plan_and_refuses(
    json_wanted: bool, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["merge", str(config), str(out), "--dry-run", "--memory", "32MiB"]
    assert main([*command, *(["--json"] if json_wanted else [])]) == 2
    captured = capsys.readouterr()
    assert "not enough memory for tensor 'a.weight'" in captured.err
    if json_wanted:
        assert json.loads(captured.out)["held"]["tensor"] == "a.weight"
    else:
        assert "113 MB of it for a.weight, held whole: method iso_c looks" in captured.out
    assert not out.exists()
    assert main([*command[:-1], "128MiB"]) == 0


GROUPS: dict[str, dict[str, str]] = {
    "none": {},
    "version 2": {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": "900000\n",
        "sys/fs/cgroup/job/memory.current": "500000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 100000\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
        "sys/fs/cgroup/job/step/memory.current": "10\n",
    },
    "version 2 in a container": {
        "proc/self/cgroup": "0::/docker/0123\n",
        "sys/fs/cgroup/memory.max": "600000\n",
        "sys/fs/cgroup/memory.current": "100000\n",
    },
    "version 1": {
        "proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "700000\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "200000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    },
    "over its limit": {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "5\n",
        "sys/fs/cgroup/memory.current": "6\n",
    },
}
EXPECTED: dict[str, Any] = {
    "none": 1_024_000,
    "version 2": 500_000,
    "version 2 in a container": 500_000,
    "version 1": 500_000,
    "over its limit": 0,
}


@pytest.mark.parametrize("kind", GROUPS)
def test_what_is_available(kind: str, tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n", **GROUPS[kind]}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(str(tmp_path)) == EXPECTED[kind]


def test_what_this_machine_has() -> None:
    found = available_memory()
    assert found is None or found > 10 * MIB

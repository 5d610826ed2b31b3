"""Killed at any instant, resumed, and the bytes are those of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.engine_models import Models, environment
from engine.hashing import hashes, stamps
from support.backends import available_backends

DRIVER = Path(__file__).with_name("slow_files.py")
SHAPES = {
    "a.weight": (101, 701),
    "b.weight": (64, 48),
    "c.bias": (150_001,),
    "d.weight": (9, 31, 401),
    "e": (),
}


def trials(folder: Path, count: int, method: str, **fields: object) -> list[dict[str, object]]:
    models = Models(folder / "m", SHAPES, ((torch.float32,),) * 4)
    before = hashes(models.folder), stamps(models.folder)
    config = folder / "config.yml"
    config.write_text(models.config(method, **fields))
    (folder / "runs").mkdir()
    ended = subprocess.run(
        [sys.executable, str(DRIVER), str(config), str(folder / "runs"), str(count), "0"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert (hashes(models.folder), stamps(models.folder)) == before
    whole, *found = map(json.loads, ended.stdout.splitlines())
    assert len(found) == count
    for trial in found:
        assert trial["hashes"] == whole["hashes"], trial["states"]
        assert trial["left"] == ["out", "written"]
    return found


@pytest.mark.skipif("native" not in available_backends(), reason="pieces need the native backend")
def test_fifty_kills(tmp_path: Path) -> None:
    """A good part of the kills must lie within the work, or the test is none."""
    parameters = {"density": 0.3, "weight": 0.7}
    found = trials(tmp_path, 52, "ties", parameters=parameters, calibrate="wsc")
    states = [state for trial in found for state in trial["states"]]
    print(f"\nkilled after so many pieces: {' '.join(states)}")
    within = {s for s in states if s.isdigit() and int(s) > 0}
    assert sum(s in within for s in states) >= 20 and len(within) >= 5
    most = max(trial["written"] for trial in found)
    for trial in found:  # what was written before is not written again
        assert trial["written"] < most or trial["states"][-1] not in within, trial["states"]


@pytest.mark.slow
def test_kills_where_whole_tensors_are_held(tmp_path: Path) -> None:
    """In torch, which has no pieces."""
    assert trials(tmp_path, 6, "model_stock")

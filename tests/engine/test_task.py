"""A shard of the output is a value: other processes make it, to the same bytes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import magic_fast as mf
from engine.engine_models import MIB, Models, environment
from magic_fast.engine.execute.shard import tasks_of

RUN = "import pickle, sys; print(len(pickle.load(sys.stdin.buffer).run(sys.argv[1])))"


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("ties", {"parameters": {"density": 0.3, "weight": 0.7}, "calibrate": "wsc"}),
        ("ties", {"parameters": {"density": 0.3}, "preset": "ties_merging"}),
        ("dare_ties", {"parameters": {"density": 0.3, "weight": 0.7}}),
        ("model_stock", {}),
    ],
    ids=["ties", "whole model", "dare", "no recipe"],
)
def test_other_processes_make_the_shards(
    method: str, fields: dict[str, object], tmp_path: Path
) -> None:
    config = Models(tmp_path / "m").config(method, **fields)
    plan = mf.plan_checkpoints(config, tmp_path / "out", max_shard_size=300_000, memory=4 * MIB)
    tasks = tasks_of(plan)
    assert len(tasks) == len(plan.shards) > 2
    mf.merge_checkpoints(config, tmp_path / "out", max_shard_size=300_000, memory=4 * MIB)
    for task in tasks:
        folder = tmp_path / "made"
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(folder)],
            input=pickle.dumps(task),
            capture_output=True,
            env=environment(),
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert int(done.stdout) >= len(task.steps)
        made, want = folder / task.shard.file, tmp_path / "out" / task.shard.file
        assert made.read_bytes() == want.read_bytes()


def test_a_changed_input_is_refused(tmp_path: Path) -> None:
    models = Models(tmp_path / "m")
    (task, *_) = tasks_of(mf.plan_checkpoints(models.config("average"), tmp_path / "out"))
    path = models.folder / "expert-0" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(mf.CheckpointError, match="File changed"):
        task.run(str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()

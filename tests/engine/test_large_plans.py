"""Planning a model of very many tensors is linear in their number, and cheap."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import yaml

import magic_fast as mf
from magic_fast.engine import MergePlan
from magic_fast.engine.execute.local import Run
from magic_fast.engine.output.identity import identity_of
from magic_fast.engine.plan.units import UNIT_BYTES
from support.backends import available_backends

SHARDS = 12


def write_headers(folder: Path, count: int) -> None:
    """A model of ``count`` small tensors whose data are holes in the files."""
    folder.mkdir()
    weight_map = {}
    names = [f"model.layers.{i // 600}.mlp.experts.{i % 600}.up_proj.weight" for i in range(count)]
    for shard in range(SHARDS):
        entries, end = {}, 0
        for name in names[shard::SHARDS]:
            entries[name] = {"dtype": "BF16", "shape": [16, 8], "data_offsets": [end, end + 256]}
            end += 256
        raw = json.dumps(entries).encode()
        path = folder / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        with open(path, "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
        weight_map |= dict.fromkeys(entries, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def plan(folder: Path, count: int, models: int) -> tuple[MergePlan, float]:
    folder.mkdir()
    for number in range(models):
        write_headers(folder / str(number), count)
    config = {
        "merge_method": "ties",
        "base_model": str(folder / "0"),
        "models": [{"model": str(folder / str(n))} for n in range(1, models)],
        "parameters": {"density": 0.2, "weight": 0.5},
        "calibrate": "wsc",
    }
    started = time.process_time()
    found = mf.plan_checkpoints(yaml.safe_dump(config), folder / "out")
    return found, time.process_time() - started


def test_every_tensor_has_its_place(tmp_path: Path) -> None:
    found, _ = plan(tmp_path / "m", 600, 3)
    places = [(info.path, info.offset) for shard in found.shards for info in shard.tensors]
    assert len(found.steps) == len(set(places)) == 600
    assert len({id(step.recipe) for step in found.steps}) == 1, "one recipe serves them all"
    described = json.loads(json.dumps(found.describe()))
    assert described["tensors"] == 600 and described["output_bytes"] == 600 * 256


@pytest.mark.slow
def test_planning_36000_tensors_of_five_models(tmp_path: Path) -> None:
    small, short = plan(tmp_path / "small", 3600, 5)
    large, long = plan(tmp_path / "large", 36_000, 5)
    print(
        f"\nplanned {len(small.steps)} tensors in {short:.2f} s, {len(large.steps)} in {long:.2f}"
    )
    assert len(large.steps) == 36_000


def calls_of(folder: Path, count: int) -> int:
    """Python functions called while a plan is made and its run is identified."""
    calls = [0]

    def count_call(frame: object, event: str, argument: object) -> None:
        calls[0] += event == "call"

    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        found, _ = plan(folder, count, 3)
        identity_of(found)
        assert found.budget.fits
    finally:
        sys.setprofile(before)
    return calls[0]


def test_the_work_of_planning_is_linear(tmp_path: Path) -> None:
    """Counted in function calls: as many more for each further tensor, whatever came before."""
    calls_of(tmp_path / "warm-up", 100)
    few, some, many = (calls_of(tmp_path / str(n), n) for n in (600, 1200, 2400))
    assert many - some == pytest.approx(2 * (some - few), rel=0.1)
    assert (many - some) / 1200 < 150, "calls for each tensor of three models"


def test_models_with_the_same_headers(tmp_path: Path) -> None:
    """Are parsed once; each has its own files all the same."""
    found, _ = plan(tmp_path / "m", 60, 3)
    for step in found.steps:
        places = {(i.info.offset, i.info.nbytes, i.info.shape) for i in step.inputs}
        assert len(places) == 1
        for source in step.inputs:
            assert source.info.path.startswith(f"{source.model}/model-")


@pytest.mark.skipif("native" not in available_backends(), reason="pieces need the native backend")
@pytest.mark.parametrize(("method", "whole"), [("task_arithmetic", False), ("ties", True)])
def test_pieces_are_no_larger_than_need_be(method: str, whole: bool, tmp_path: Path) -> None:
    """8 MiB, all arrays together, but where the threshold of a tensor is found in its block."""
    rows, cols = 1003, 2048
    header = {"w": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [0, rows * cols * 2]}}
    raw = json.dumps(header).encode()
    for name in ("base", "a", "b"):
        path = tmp_path / name / "model.safetensors"
        path.parent.mkdir()
        with open(path, "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + rows * cols * 2)
    config = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / n)} for n in ("a", "b")],
        "parameters": {"weight": 0.5, **({"density": 0.5} if method == "ties" else {})},
        "calibrate": "wsc",
    }
    found = mf.plan_checkpoints(yaml.safe_dump(config), tmp_path / "out")
    (step,) = found.steps
    pieces = Run(found, "error", None).pieces(step)
    assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])]
    assert pieces[-1].stop == step.numel
    assert all(p.start % cols == 0 for p in pieces)
    assert (len(pieces) == 1) is whole
    if not whole:
        assert all(p.nbytes <= UNIT_BYTES for p in pieces)
        assert max(p.nbytes for p in pieces) > UNIT_BYTES // 2

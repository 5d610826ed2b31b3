"""``resume`` on a finished output: what made it is compared, its bytes are verified."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import magic_fast as mf
from engine.engine_models import Models, write_model
from engine.hashing import hashes, stamps
from magic_fast.engine.output.verify import verify_checkpoint
from support.backends import available_backends

SHAPES = {"a.weight": (33, 70), "b.weight": (16, 8), "c.bias": (101,), "d": ()}


class Finished:
    """Models, a configuration with relative names beside them, and the result of its merge."""

    def __init__(self, folder: Path, out: str = "out", **options: Any) -> None:
        self.folder = folder
        Models(folder / "m", SHAPES, ((torch.float32,),) * 3)
        document = {
            "merge_method": "dare_ties",
            "base_model": "./m/base",
            "models": [{"model": f"./m/expert-{k}"} for k in range(2)],
            "parameters": {"density": 0.5, "weight": 0.7},
        }
        self.config = folder / "config.yml"
        self.config.write_text(yaml.safe_dump(document))
        self.out = folder / out
        self.merge(**options)

    def merge(self, config: Path | None = None, **options: Any) -> mf.MergeReport:
        return mf.merge_checkpoints(config or self.config, self.out, **options)

    def edited(self, old: str, new: str) -> Path:
        text = self.config.read_text()
        assert old in text
        path = self.folder / "edited.yml"
        path.write_text(text.replace(old, new))
        return path


@pytest.fixture(params=["out", "out.safetensors"])
def finished(request: pytest.FixtureRequest, tmp_path: Path) -> Finished:
    return Finished(tmp_path, request.param)


def refusal(finished: Finished, **options: Any) -> str:
    before = stamps(finished.folder)
    with pytest.raises(mf.InputError) as caught:
        finished.merge(resume=True, **options)
    assert stamps(finished.folder) == before, "a refusal changes nothing"
    message = str(caught.value)
    assert message.startswith(f"resume for {str(finished.out)!r}: expected the result of this run")
    assert message.endswith("Name another output, or remove it.")
    return message


def test_the_same_run(finished: Finished) -> None:
    before = stamps(finished.folder)
    assert finished.merge(resume=True).bytes_written == 0
    assert finished.merge(resume=True, memory=8 << 20).bytes_written == 0
    assert stamps(finished.folder) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seed": 3}, "another: seed: was 0, is 3."),
        ({"calibrate": "wsc"}, "another: calibrate: was none, is set."),
        ({"compat": "mergekit-0.1.4"}, "another: compat: was none, is mergekit-0.1.4."),
        ({"nonfinite": "propagate"}, "another: nonfinite: was error, is propagate."),
    ],
    ids=lambda value: str(value)[:20],
)
def test_another_option(finished: Finished, options: dict[str, Any], expected: str) -> None:
    assert expected in refusal(finished, **options)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("density: 0.5", "density: 0.4", "another: the configuration."),
        ("merge_method", "preset: default\nmerge_method", "preset: was mergekit, is default"),
        ("merge_method", "out_dtype: bfloat16\nmerge_method", "out_dtype: was none, is bfloat16"),
        ("merge_method", "seed: 9\nmerge_method", "seed: was 0, is 9"),
    ],
    ids=["parameter", "preset", "dtype", "seed"],
)
def test_another_configuration(finished: Finished, old: str, new: str, expected: str) -> None:
    message = refusal(finished, config=finished.edited(old, new))
    assert "another: the configuration" in message and expected in message


def test_another_setting_of_the_calibration(tmp_path: Path) -> None:
    finished = Finished(tmp_path, calibrate=mf.WeightCalibration())
    finished.merge(resume=True, calibrate="wsc")
    message = refusal(finished, calibrate=mf.WeightCalibration(strength=0.5, clamp=None))
    assert (
        "another: calibrate: clamp was [0.1, 10.0], is none, strength was 1.0, is 0.5." in message
    )


def test_another_backend(finished: Finished) -> None:
    if "native" not in available_backends():
        pytest.skip("one backend is no other")
    assert "another: the backend: was native, is torch." in refusal(finished, backend="torch")


def test_another_shard_size(tmp_path: Path) -> None:
    finished = Finished(tmp_path)
    assert "the layout of the output" in refusal(finished, max_shard_size=1)


@pytest.mark.parametrize("change", ["time", "values", "tensor"])
def test_another_input(finished: Finished, change: str) -> None:
    folder = finished.folder / "m" / "expert-1"
    path = folder / "model.safetensors"
    if change == "time":
        later = path.stat().st_mtime_ns + 3600 * 10**9
        os.utime(path, ns=(later, later))
        expected = "it was written to since"
    elif change == "values":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        later = finished.out.stat().st_mtime_ns + 10**9
        os.utime(path, ns=(later, later))
        expected = "it was written to since"
    else:
        shutil.rmtree(folder)
        write_model(folder, {n: torch.zeros(s).half() for n, s in SHAPES.items()})
        expected = "m/expert-1/model.safetensors: size was"
    message = refusal(finished)
    assert expected in message and "m/expert-1/model.safetensors" in message


def test_a_result_of_something_else(finished: Finished, tmp_path: Path) -> None:
    """The right tensors, but nothing that says where they come from."""
    if finished.out.is_dir():
        (finished.out / "magic_fast.json").unlink()
    else:
        shutil.copy(tmp_path / "m" / "base" / "model.safetensors", finished.out)
    assert "it does not say what run made it" in refusal(finished)


def test_moving_the_folder_changes_nothing(tmp_path: Path) -> None:
    """Neither is a path of the machine in the record, nor does a moved result stop being one."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    finished = Finished(here)
    assert str(tmp_path) not in (finished.out / "magic_fast.json").read_text()
    assert str(tmp_path) not in (finished.out / "README.md").read_text()
    here.rename(there)
    finished.folder, finished.config, finished.out = there, there / "config.yml", there / "out"
    assert finished.merge(resume=True).bytes_written == 0
    before = hashes(finished.out)
    shutil.rmtree(finished.out)
    finished.merge()
    assert hashes(finished.out) == before


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("backend", [b for b in available_backends() if b in ("native", "torch")])
def test_values_that_are_let_through(name: str, backend: str, tmp_path: Path) -> None:
    """Their number is in the record, and a result with that many is sound."""
    models = Models(tmp_path / "m", SHAPES, ((torch.float32,),) * 3)
    bad = {n: t.clone() for n, t in models.experts[1].items()}
    bad["c.bias"][[3, 77]] = torch.tensor([torch.nan, torch.inf])
    write_model(tmp_path / "bad", bad)
    config = models.config("task_arithmetic", parameters={"weight": 0.5})
    config = config.replace(str(models.folder / "expert-1"), str(tmp_path / "bad"))
    out = tmp_path / name
    options: dict[str, Any] = {"backend": backend, "nonfinite": "propagate"}
    report = mf.merge_checkpoints(config, out, **options)
    assert {t.name: t.nonfinite for t in report.tensors if t.nonfinite} == {"c.bias": 2}
    found = verify_checkpoint(out)
    assert found.problems == [] and found.nonfinite == 2
    mf.merge_checkpoints(config, out, resume=True, **options)
    if out.is_dir():
        path = out / "magic_fast.json"
        record = json.loads(path.read_text())
        assert record["nonfinite"] == {"c.bias": 2}
        path.write_text(json.dumps(record | {"nonfinite": {"c.bias": 1}}))
        (problem,) = verify_checkpoint(out).problems
        assert problem == (
            "tensor 'c.bias' in model.safetensors: 2 values are NaN or infinite where the merge "
            "wrote 1, the first at flat index 3"
        )
        del record["nonfinite"]
        path.write_text(json.dumps(record))
        (problem,) = verify_checkpoint(out).problems
        assert "2 values are NaN or infinite, the first at flat index 3" in problem


def test_none_is_let_through(tmp_path: Path) -> None:
    """Allowed, but there were none."""
    finished = Finished(tmp_path, nonfinite="propagate")
    assert json.loads((finished.out / "magic_fast.json").read_text())["nonfinite"] == {}
    assert verify_checkpoint(finished.out).ok

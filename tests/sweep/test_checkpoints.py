"""A sweep of checkpoints gives the bits of separate merges, all or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import magic_fast as mf
from engine.engine_models import MIB, Models, read_out
from magic_fast.api.checkpoints.sweep import sweep_checkpoints

B, F = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    extra = {"position_ids": torch.arange(9)}
    dtypes = ((B,), (B, F), (B,), (F,))
    return Models(tmp_path_factory.mktemp("models"), dtypes=dtypes, extra=extra)


def assert_equals_separate_merges(
    config: str, settings: dict[str, list[Any]], tmp_path: Path, **options: Any
) -> None:
    """Bit for bit: integers and floats alike."""
    from magic_fast.planning.combinations import combinations, configure
    from magic_fast.planning.sources import read_config

    report = sweep_checkpoints(config, tmp_path / "sweep", settings, **options)
    chosen = combinations(settings)
    assert [c.name for c in report.combinations] == [c.name for c in chosen]
    for combination in chosen:
        apart = tmp_path / "apart" / f"{combination.name}.safetensors"
        mf.merge_checkpoints(configure(read_config(config), combination), apart, **options)
        one, other = read_out(tmp_path / "sweep" / combination.name), load_file(apart)
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), (combination.name, name)
    assert mf.verify_checkpoint(tmp_path / "sweep" / chosen[-1].name).ok
    index = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [c["values"] for c in index["combinations"]] == [dict(c.values) for c in chosen]
    folders = {p.name for p in (tmp_path / "sweep").iterdir()} - {"sweep.json"}
    assert folders == {c["folder"] for c in index["combinations"]}


TIES = {"density": [0.1, 1.0], "lambda": [0.3, 1.0, 1.7]}
CASES = {
    "ties": ("ties", TIES, {}),
    "whole model thresholds": ("ties", TIES, {"preset": "ties_merging"}),
    "majority": ("ties", {"density": [0.1, 0.4], "scale": [0.3, 0.5, 2]}, {"preset": "magic"}),
    "random": ("dare_ties", {"density": [0.3, 0.5], "lambda": [0.5, 1.0], "seed": [0, 7]}, {}),
    "ranked": ("della", {"density": [0.3, 0.5], "lambda": [0.5, 1.0, 2.0]}, {}),
    "norms": ("ties", TIES, {"parameters": {"rescale": "l2"}}),
    "calibrated": ("ties", TIES, {"calibrate": "wsc"}),
    "consensus": ("consensus_ta", {"lambda": [0.5, 1.0, 2.0], "min_tasks": [1, 2]}, {}),
    "no base": ("linear", {"normalize": [True, False]}, {}),
    "whole tensors": ("iso_c", {"lambda": [0.5, 1.0]}, {"calibrate": "wsc"}),
    "calibrate.scale": ("ties", {"calibrate.scale": [0.5, 1.0]}, {"calibrate": "wsc"}),
}


@pytest.mark.parametrize(
    ("case", "memory"), [("ties", 128 * MIB), *((case, 4 * MIB) for case in CASES)]
)
def test_same_bits(models: Models, tmp_path: Path, case: str, memory: int) -> None:
    method, settings, fields = CASES[case]
    config = models.config(method, **fields)
    assert_equals_separate_merges(config, settings, tmp_path, memory=memory)


def test_torch(models: Models, tmp_path: Path) -> None:
    settings = {"density": [0.1, 0.4], "lambda": [0.5, 1.0]}
    config = models.config("ties", preset="ties_merging", dtype="bfloat16")
    assert_equals_separate_merges(config, settings, tmp_path, backend="torch")


def test_one_read(models: Models, tmp_path: Path) -> None:
    """Whole tensors: every input byte once. In pieces: three densities share their passes."""
    stored = sum(t.nbytes for m in (models.base, *models.experts) for t in m.values())

    def read(out: str, memory: int, **settings: list[float]) -> int:
        report = sweep_checkpoints(models.config("ties"), tmp_path / out, settings, memory=memory)
        return report.reports[0].bytes_read

    three = {"density": [0.1, 0.2, 0.4], "scale": [1.0]}
    assert read("whole", 128 * MIB, **three) == stored
    one = read("one", 4 * MIB, density=[0.2], scale=[0.3, 0.5, 1.0])
    assert read("three", 4 * MIB, **three) < 2 * one  # some threshold may need another look


def test_nonfinite_leaves_nothing(models: Models, tmp_path: Path) -> None:
    bad = {n: t.clone() for n, t in models.experts[1].items()}
    bad["model.layers.1.long.bias"][199_000] = float("nan")
    from engine.engine_models import write_model

    folder = write_model(tmp_path / "bad", bad)
    config = models.config("ties").replace(str(models.folder / "expert-1"), str(folder))
    with pytest.raises(mf.NonFiniteError, match=r"expert 1 for 'model\.layers\.1\.long\.bias'"):
        sweep_checkpoints(config, tmp_path / "out", TIES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "at least one parameter"),
        ({"density": []}, "at least one, got none"),
        ({"density": [0.1, 0.1]}, "each once"),
        ({"density": [0.1, 1.5]}, r"expected a finite number in \(0, 1\].* got 1.5"),
        ({"density": [None]}, "got nothing"),
        ({"denisty": [0.1]}, "Did you mean 'density'"),
        ({"epsilon": [0.1]}, "unknown parameter 'epsilon' for ties"),
        ({"lambda": [1], "scale": [2]}, "got it as 'lambda' too"),
        ({"density": [i / 300 for i in range(1, 258)]}, "at most 256, got 257"),
        ({"calibrate.strength": [0.5]}, "Add 'calibrate: wsc'"),
    ],
)
def test_refused(
    models: Models, tmp_path: Path, settings: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(mf.ConfigError, match=message):
        sweep_checkpoints(models.config("ties"), tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


def test_finer_settings_are_refused(models: Models, tmp_path: Path) -> None:
    config = mf.MergeConfig.from_yaml(models.config("ties")).as_dict()
    config["models"][1]["parameters"] = {"density": 0.5}
    with pytest.raises(mf.ConfigError, match="a sweep would not change"):
        sweep_checkpoints(config, tmp_path / "out", {"density": [0.1]})


def test_output_in_the_way(models: Models, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(mf.OutputError, match="missing or empty"):
        sweep_checkpoints(models.config("ties"), tmp_path / "out", TIES)


def test_disk_too_small(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from magic_fast.api.checkpoints import sweep as sweeping_checkpoints

    one = sum(t.nbytes for t in models.base.values())
    monkeypatch.setattr(sweeping_checkpoints, "free_bytes", lambda out: 3 * one)
    with pytest.raises(mf.OutputError, match="free bytes for 6 models"):
        sweep_checkpoints(models.config("ties"), tmp_path / "out", TIES)
    assert not list(tmp_path.iterdir())


def test_scale_under_calibration_warns(models: Models, tmp_path: Path) -> None:
    config = models.config("ties", calibrate="wsc")
    report = sweep_checkpoints(config, tmp_path / "out", {"lambda": [0.5, 1.0]})
    assert any("lambda cancels" in w for w in report.warnings)
    one, other = (read_out(tmp_path / "out" / f"lambda={x}") for x in (0.5, 1.0))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(one[name].float(), other[name].float(), rtol=2**-7)
    assert not torch.equal(one["model.norm.weight"], other["model.norm.weight"])

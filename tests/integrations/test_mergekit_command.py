"""``magic-fast mergekit-yaml``: mergekit's command, flags and output, with our methods inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from magic_fast.cli import main
from support.models import load, write_config


def call(*words: str, program: tuple[str, ...] = ("magic_fast", "mergekit-yaml")) -> Any:
    """A fresh process without network: exit code, output, errors."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *program, *words],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


def stock(*words: str) -> Any:
    return call(*words, program=("mergekit.scripts.run_yaml",))


def test_help_is_mergekits(registry: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from mergekit.scripts.run_yaml import main as theirs

    with pytest.raises(SystemExit) as ended:
        main(["mergekit-yaml", "--help"])
    assert ended.value.code == 0
    ours = capsys.readouterr().out
    theirs.main(["--help"], prog_name="magic-fast mergekit-yaml", standalone_mode=False)
    assert ours == capsys.readouterr().out
    assert "Usage: magic-fast mergekit-yaml [OPTIONS] CONFIG_FILE OUT_PATH" in ours


def test_same_output(registry: dict[str, Any], tiny_models: Path, tmp_path: Path) -> None:
    """The same files with the same names; tensors of a sum to the last bit."""
    config = write_config(
        tmp_path, tiny_models, merge_method="task_arithmetic", calibrate=None,
        parameters={"weight": 0.5}, dtype="float32", out_dtype="bfloat16",
    )  # fmt: skip
    ours = call(str(config), str(tmp_path / "ours"), "-v", "--out-shard-size", "200K")
    assert ours.returncode == 0, ours.stderr
    assert "INFO:magic_fast:mergekit 0.1.5: replaced linear, task_arithmetic," in ours.stderr
    theirs = stock(str(config), str(tmp_path / "theirs"), "--out-shard-size", "200K")
    assert theirs.returncode == 0, theirs.stderr
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "ours" / index).read_text()) == json.loads(
        (tmp_path / "theirs" / index).read_text()
    )
    a, b = load(tmp_path / "ours"), load(tmp_path / "theirs")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=2**-8, atol=1e-7, msg=name)


def test_calibrated_as_our_own_command(
    registry: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    """``calibrate`` among the parameters of mergekit's YAML is ``calibrate:`` of ours."""
    import magic_fast as mf

    parameters = {"density": 0.2, "weight": 1.0}
    own = write_config(tmp_path, tiny_models, calibrate="wsc", parameters=parameters)
    mf.merge_checkpoints(own, tmp_path / "own")
    inside = write_config(
        tmp_path, tiny_models, calibrate=None, parameters=parameters | {"calibrate": "wsc"}
    )
    done = call(str(inside), str(tmp_path / "inside"), "-j", "1")
    assert done.returncode == 0, done.stderr
    a, b = load(tmp_path / "inside"), load(tmp_path / "own")
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_bad_calibrate_is_an_error_of_the_input(
    registry: dict[str, Any],
    tiny_models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(
        tmp_path, tiny_models, calibrate=None, parameters={"weight": 1.0, "calibrate": "wcs"}
    )
    assert main(["mergekit-yaml", str(config), str(tmp_path / "out"), "--quiet"]) == 2
    assert (
        "magic-fast: error: calibrate: expected wsc, none or settings in quotes such as "
        "'{variant: sphere}', got 'wcs' (an unknown word). Correct it.\n"
    ) in capsys.readouterr().err

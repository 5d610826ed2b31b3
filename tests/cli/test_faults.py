"""What the user got wrong: exit code 2, a message that names it, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from magic_fast.cli import main
from support.models import load, write_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path, tiny_models: Path) -> Path:
    return write_config(tmp_path, tiny_models)


def refused(arguments: list[str], capsys: Capture) -> str:
    """The message of a command that must fail by the user's fault."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("magic-fast: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_output_in_the_way(config: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    message = refused(["merge", str(config), str(out)], capsys)
    assert str(out) in message
    assert (out / "precious").read_text() == "mine"


def test_configuration_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    message = refused(["merge", str(tmp_path / "no.yml"), str(tmp_path / "out")], capsys)
    assert "no.yml" in message
    with_override = ["merge", str(tmp_path / "no.yml"), str(tmp_path / "out"), "--preset", "magic"]
    assert "no.yml" in refused(with_override, capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge_methd": "ties"}, ("merge_methd", "merge_method")),
        ({"merge_method": "tees"}, ("tees", "ties")),
        ({"parameters": {"density": 1.5}}, ("density", "1.5")),
        ({"parameters": {"density": 0}}, ("density", "0")),
        ({"parameters": {"density": -1}}, ("density", "-1")),
        ({"parameters": {"densty": 0.5}}, ("densty", "density")),
    ],
)
def test_wrong_configuration(
    changes: dict[str, Any],
    words: tuple[str, ...],
    tiny_models: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    config = write_config(tmp_path, tiny_models, **changes)
    message = refused(["merge", str(config), str(tmp_path / "out")], capsys)
    assert "merge.yml, line " in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault", ["missing model", "missing shard", "truncated", "shape", "tensor"]
)
def test_damaged_checkpoint(fault: str, tiny_models: Path, tmp_path: Path, capsys: Capture) -> None:
    """Named before any work: nothing is left, under whatever name."""
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    shard = models / "expert-1/model-00002-of-00003.safetensors"
    word = "expert-1"
    if fault == "missing model":
        shutil.rmtree(models / "expert-1")
    elif fault == "missing shard":
        shard.unlink()
        word = shard.name
    elif fault == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
        word = shard.name
    else:
        tensors = load_file(shard)
        word = next(iter(tensors))
        if fault == "shape":
            tensors[word] = tensors[word][:-1].clone()
        else:
            del tensors[word]
        save_file(tensors, shard, {"format": "pt"})
    config = write_config(tmp_path, models)
    assert word in refused(["merge", str(config), str(tmp_path / "out")], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "merge.yml"}


def test_pickle_checkpoint(tiny_models: Path, tmp_path: Path, capsys: Capture) -> None:
    model = tmp_path / "pickled"
    model.mkdir()
    shutil.copy(tiny_models / "base/config.json", model)
    torch.save(load(tiny_models / "expert-0"), model / "pytorch_model.bin")
    config = write_config(tmp_path, tiny_models, models=[{"model": str(model)}])
    message = refused(["merge", str(config), str(tmp_path / "out")], capsys)
    assert "pickled" in message
    assert "safetensors" in message


def test_not_a_number_names_tensor_and_expert(
    tiny_models: Path, tmp_path: Path, capsys: Capture
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    shard = models / "expert-1/model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    config = write_config(tmp_path, models)
    message = refused(["merge", str(config), str(tmp_path / "out")], capsys)
    assert name in message
    assert "expert 1" in message
    assert not (tmp_path / "out").exists()

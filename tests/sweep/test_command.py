"""``magic-fast sweep``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.engine_models import Models, read_out
from magic_fast.cli import main, options
from magic_fast.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    models = Models(
        tmp_path / "models", {"a.weight": (9, 7), "b.bias": (5,)}, ((torch.float32,),) * 3
    )
    path = tmp_path / "ties.yml"
    path.write_text(models.config("ties"))
    return path


def test_sweep(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["sweep", str(config), str(out), "--set", "density=0.2,0.5", "--set", "scale=0,1"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [f"density={d},scale={s}" for d in (0.2, 0.5) for s in (0, 1)]
    assert [c["name"] for c in told["combinations"]] == names
    base = read_out(tmp_path / "models" / "base")
    for name in names:
        same = torch.equal(read_out(out / name)["a.weight"], base["a.weight"])
        assert same == name.endswith("scale=0")
    assert main(command) == 2
    assert "missing or empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"), [("densty=1", "Did you mean"), ("density", "no '='")]
)
def test_mistakes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str, message: str
) -> None:
    assert main(["sweep", str(config), str(tmp_path / "out"), "--set", settings]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_values_are_yaml() -> None:
    found = options.settings(["density=0.1,[0.2, 0.5]", "normalize=true,false"])
    assert found == {"density": [0.1, [0.2, 0.5]], "normalize": [True, False]}
    for wrong in (["a=[1"], ["a=1", "a=2"], ["=1"]):
        with pytest.raises(ConfigError):
            options.settings(wrong)

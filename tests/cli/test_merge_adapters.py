"""``magic-fast merge-adapters``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import magic_fast as mf
from adapters.adapter_files import draw_lora, write_ia3, write_peft
from magic_fast.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [str(write_peft(tmp_path / str(k), draw_lora(k, rank=2 + k))) for k in range(3)]


def test_as_the_call(paths: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    settings = ["density=0.4", "weights=[1, 2, 1]", "calibrate.clamp=[0.5, 2]"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["merge-adapters", *paths, str(out), "--method", "ties", "--rank", "3", *words]
    assert main([*command, "--calibrate", "sphere"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"Wrote {out}: 3 modules of a LoRA adapter by ties, rank 3.")
    assert "The rank leaves out" in told
    assert "Calibrated 64 rows of 3 modules." in told
    assert "Magnitude, 1 as the adapters' mean" in told
    mf.merge_adapters(
        paths, tmp_path / "call", "ties", density=0.4, weights=[1, 2, 1], rank=3,
        calibrate={"variant": "sphere", "clamp": (0.5, 2)},
    )  # fmt: skip
    one, other = (
        load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "call")
    )
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_as_json(paths: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["merge-adapters", *paths, str(out), "--json", "--calibrate", "wsc"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["kind"], told["method"]) == (str(out), "lora", "average")
    assert told["modules"][0]["ranks"] == [2, 3, 4] and told["modules"][0]["rank"] == 9
    assert told["modules"][0]["calibration"]["calibrated"] is True


def test_ia3(tmp_path: Path, capsys: Capture) -> None:
    import torch

    paths = [
        str(write_ia3(tmp_path / str(k), {"k_proj": torch.full((4, 1), 1.0 + k)})) for k in range(2)
    ]
    assert main(["merge-adapters", *paths, str(tmp_path / "out")]) == 0
    assert "1 module of an IA3 adapter by average." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "density"], "--set 'density': expected NAME=VALUE, got no '='."),
        (
            ["--set", "weights=1,2,3"],
            "--set weights: expected one value, got 3. Put a list in brackets: weights=[…].",
        ),
        (
            ["--set", "out=x"],
            "--set out: expected a parameter of the method, got another word.",
        ),
        (["--backend", "foo"], "backend 'foo'"),
        (["--set", "rank=3"], "--set rank: expected a parameter, got an option. Use --rank."),
        (
            ["--set", "calibrate.p=1"],
            "--set calibrate.p: expected it with --calibrate, got none. Choose a calibration, or "
            "leave it out.",
        ),
        (
            ["--set", "calibrate.q=1", "--calibrate", "sphere"],
            "calibration 'q': expected one of variant,",
        ),
        (["--method", "tise"], "Did you mean 'ties'?"),
        (["--set", "densty=0.4", "--method", "ties"], "parameter 'densty' for method 'ties'"),
    ],
)
def test_mistakes(
    paths: list[str], tmp_path: Path, capsys: Capture, words: list[str], message: str
) -> None:
    assert main(["merge-adapters", *paths, str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("magic-fast: error: ") and message in told
    assert "Traceback" not in told and not (tmp_path / "out").exists()


def test_a_rank_that_is_none(paths: list[str], tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["merge-adapters", *paths, str(tmp_path / "out"), "--rank", "0"])
    assert caught.value.code == 2
    assert "expected a whole number of at least 1" in capsys.readouterr().err

"""``magic-fast demo`` on tiny checkpoints, and what its verification finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from magic_fast.cli import main
from magic_fast.cli.demo import PROBE, demo_config, verify
from magic_fast.errors import InternalError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--folder", str(folder), "--size", "tiny", "-q"]) == 0
    return folder / "tiny"


def test_says_what_it_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--folder", str(folder.parent), "--size", "tiny"]) == 0  # again
    printed = capsys.readouterr().out
    for part in (
        "Checkpoints: base and 3 experts, 0.2 M parameters",
        "Merge: ties + WSC into",
        "Largest deviations in magnitude",
        "safetensors: 21 tensors",
        f"{PROBE} is what mf.merge gives in memory, bit for bit",
        "transformers",
        "Does calibration help?",
        "each expert on its own task",
        "Page of plots: ",
    ):
        assert part in printed
    page = folder / "report.html"
    assert page.is_file() == (importlib.util.find_spec("plotly") is not None)


@pytest.mark.parametrize("fault", ["value", "infinite", "missing"])
def test_verification_finds_damage(fault: str, folder: Path) -> None:
    merged = folder / "merged"
    (file,) = [f for f in merged.glob("*.safetensors") if PROBE in load_file(f)]
    whole = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in whole.items()}
    if fault == "value":
        tensors[PROBE].view(torch.int16)[0, 0] ^= 1
    elif fault == "infinite":
        tensors[PROBE][0, 0] = float("inf")
    else:
        del tensors[PROBE]
    save_file(tensors, file, {"format": "pt"})
    try:
        with pytest.raises(InternalError, match="wrong result for"):
            list(verify(merged, demo_config(folder), backend="torch"))
    finally:
        save_file(whole, file, {"format": "pt"})

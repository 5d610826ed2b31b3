"""Releases that do not go beside the ones of the other tests, each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import magic_fast as mf

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize(
    ("environment", "checks"),
    [
        ("0.1.4", "mergekit_0_1_4_checks.py"),
        ("fusion-bench", "fusion_bench_checks.py"),
        ("fusion-bench", "fusion_bench_data_checks.py"),
        ("diffusers", "diffusers_checks.py"),
        ("diffusers", "lycoris_checks.py"),
        ("vision", "vision_checks.py"),
    ],
)
def test_runs_there(environment: str, checks: str) -> None:
    python = ROOT / f".peers-{environment}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .peers-{environment} here: `make peers-{environment}` brings it")
    run = subprocess.run(
        [
            *(str(python), "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "--rootdir", str(HERE), "--noconftest", "--import-mode=importlib"),
            str(HERE / checks),
        ],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout


@pytest.mark.skipif(find_spec("fusion_bench") is not None, reason="fusion_bench is installed here")
def test_without_fusion_bench_the_error_names_the_extra() -> None:
    front = mf.integrations.fusion_bench
    assert "fusion_bench" not in sys.modules
    with pytest.raises(mf.InputError) as caught:
        front.MagicFastAlgorithm  # noqa: B018
    assert str(caught.value) == (
        "package 'fusion_bench': expected it for magic_fast.integrations.fusion_bench, got No "
        "module named 'fusion_bench'. Install the extra: pip install 'magic_fast[fusion-bench]'."
    )
    with pytest.raises(AttributeError, match="has no attribute 'Algorithm'"):
        front.Algorithm  # noqa: B018

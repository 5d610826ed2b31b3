"""The replacement inside mergekit 0.1.4, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parents[1] / ".peers-0.1.4" / "bin" / "python"


@pytest.mark.skipif(
    not PYTHON.exists(), reason="no mergekit 0.1.4 in .peers-0.1.4: `make peers-0.1.4` brings it"
)
def test_its_methods_run_here() -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [
            *(str(PYTHON), "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "--rootdir", str(HERE), "--noconftest", "--import-mode=importlib"),
            str(HERE / "mergekit_0_1_4_checks.py"),
        ],
        cwd=HERE, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout

"""What `make gpu` runs, as far as a machine without a GPU can: on the emulated kernels, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("needs_cuda")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_benchmark_writes_its_tables(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    done = run(
        "bench.py", "--device", "cpu", "--size", "16", "--sets", "1", "--backends", "cuda",
        "--no-peers", *files,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) == 7 and all(r["seconds"] > 0 and r["bytes"] > 0 for r in rows)
    assert "| TIES q 0.2 + WSC, K = 3 | cuda |" in (tmp_path / "r.md").read_text()


def test_the_short_suite_runs_every_kind() -> None:
    done = run("short.py", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "ranked done" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_one_line_says_so() -> None:
    script = ROOT / "benchmarks" / "gpu" / "run.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 3
    assert "expected a torch that sees a GPU" in done.stderr and not done.stdout

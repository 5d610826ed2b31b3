"""What `make gpu` runs, as far as a machine without a GPU can: on the emulated kernels, small."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

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
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    done = run("run.py", "--results", str(tmp_path / "results"))
    assert done.returncode == 3 and not done.stdout
    assert done.stderr == "make gpu: no GPU is visible to torch here. Nothing was run.\n"
    assert not (tmp_path / "results").exists()


@pytest.fixture
def runner() -> ModuleType:
    """benchmarks/gpu/run.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks/gpu/run.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(
    runner: ModuleType, tmp_path: Path
) -> None:
    steps = runner.Run(sys.executable, tmp_path / "logs", time.monotonic() + 60)

    def python(name: str, code: str) -> Callable[[float], tuple[str, str]]:
        command = steps.command(name, [sys.executable, "-c", code])
        return lambda deadline: steps.one(command, deadline)

    steps.step("right", 30, python("right", "print('4 passed')"))
    steps.step("wrong", 30, python("wrong", "print('a | b'); raise SystemExit(2)"))
    hang = "import time; print('began', flush=True); time.sleep(60)"
    steps.step("hangs", 3, python("hangs", hang))
    steps.step("absent", 30, _missing)
    steps.end = time.monotonic()
    steps.step("late", 30, python("late", "pass"))
    assert [s.state for s in steps.steps] == ["passed", "failed", "failed", "failed", "not run"]
    assert steps.steps[2].seconds < 20
    result = {"command": "make gpu", "facts": {}, "steps": [asdict(s) for s in steps.steps]}
    text = runner.document(result, "TABLES")
    assert "| right | passed | 0 | 4 passed |" in text and "| wrong | failed | 0 | a / b |" in text
    assert "out of time: began" in text and text.endswith("TABLES\n")


def _missing(deadline: float) -> tuple[str, str]:
    raise FileNotFoundError("no such program")


def test_the_package_is_laid_out_without_an_installation(
    runner: ModuleType, tmp_path: Path
) -> None:
    runner.lay_out(tmp_path)
    code = "import magic_fast, magic_fast.kernels as k; print(magic_fast.__file__, k.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    package = tmp_path / "magic_fast"
    assert done.stdout.split() == [
        str(package / "__init__.py"),
        str(package / "kernels/__init__.py"),
    ]

"""PEFT's own tests of weighted adapters pass with the replacement as they do without."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytest.importorskip("peft", reason="peft is not installed: pip install 'magic_fast[peft]'")


def _fetching() -> object:
    spec = importlib.util.spec_from_file_location("fetch_suites", HERE / "fetch_suites.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _outcomes(suite: Path, replace: bool, scratch: Path) -> dict[str, str]:
    found = scratch / f"outcomes-{replace}.json"
    environment = os.environ | {
        "MAGIC_FAST_REPLACE": str(int(replace)),
        "MAGIC_FAST_OUTCOMES": str(found),
        "PYTHONPATH": f"{suite}{os.pathsep}{HERE}",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "peft_suite_plugin", "-p", "no:cacheprovider",
        "-c", os.devnull, "--rootdir", str(suite), "-k", "weighted",
        str(suite / "tests" / "test_custom_models.py"), str(HERE / "peft_local_models.py"),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)
    assert found.is_file(), run.stdout + run.stderr
    outcomes: dict[str, str] = json.loads(found.read_text())
    return outcomes


def test_weighted_adapters(tmp_path: Path) -> None:
    suite: Path = _fetching().folder_of("peft")  # type: ignore[attr-defined]
    if not suite.is_dir():
        pytest.skip(
            f"PEFT's tests are not in {suite.parent.name}/{suite.name}: `make suites` brings them"
        )
    own, ours = (_outcomes(suite, replace, tmp_path) for replace in (False, True))
    assert ours == own
    passed = [name for name, outcome in ours.items() if outcome == "passed"]
    assert len(passed) >= 12, own
    assert {"passed", "skipped"} >= set(own.values()), own

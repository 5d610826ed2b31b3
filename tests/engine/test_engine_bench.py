"""The benchmark of whole merges runs, and says what is absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.engine_models import environment

COMPILER = os.environ.get("CC", "cc")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs the C compiler {COMPILER!r}")
def test_bench_runs(root: Path, tiny_models: Path, tmp_path: Path) -> None:
    bench = [sys.executable, str(root / "benchmarks" / "engine" / "bench.py")]
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    ended = subprocess.run(
        [*bench, "--set", f"tiny={tiny_models}", "--counts", "tiny", "--rounds", "1", *files],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "r.json").read_text())
    ran = [r for r in rows if not r["absent"]]
    assert len(ran) == 8 and all(r["median"] > 0 for r in ran)
    assert {r["absent"] for r in rows if r["absent"]} == {
        "no --peers given",
        "the set has 3 experts",
    }
    assert (tmp_path / "r.md").read_text() in ended.stdout

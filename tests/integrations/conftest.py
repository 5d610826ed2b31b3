"""mergekit, where it is installed, and left as it was found; other libraries' own tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from magic_fast.integrations import mergekit as ours

HERE = Path(__file__).resolve().parent


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    """mergekit's table of methods; skips where mergekit is absent."""
    found = pytest.importorskip(
        "mergekit.merge_methods.registry",
        reason="mergekit is not installed: pip install 'magic_fast[mergekit]'",
    )
    table: dict[str, Any] = found._METHODS
    before = dict(table)
    yield table
    ours.uninstall()
    assert table == before


def _folder_of(package: str) -> Path:
    """Where `make suites` puts the tests of the installed release."""
    spec = importlib.util.spec_from_file_location("fetch_suites", HERE / "fetch_suites.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.folder_of(package)
    return folder


@pytest.fixture
def suite_outcomes(tmp_path: Path) -> Callable[..., tuple[dict[str, str], dict[str, str]]]:
    """(package, files of its tests, options and files of pytest) → outcome by test, with its own
    functions and with ours; skips where its tests are not here."""

    def run(
        package: str, files: tuple[str, ...], *options: str
    ) -> tuple[dict[str, str], dict[str, str]]:
        suite = _folder_of(package)
        if not suite.is_dir():
            pytest.skip(f"no {suite.parent.name}/{suite.name} here: `make suites` brings its tests")
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "suite_plugin", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "--rootdir", str(suite), *options),
            *(str(suite / "tests" / name) for name in files),
        ]
        found = []
        for replace in (False, True):
            outcomes = tmp_path / f"outcomes-{replace}.json"
            environment = os.environ | {
                "MAGIC_FAST_SUITE": package,
                "MAGIC_FAST_REPLACE": str(int(replace)),
                "MAGIC_FAST_OUTCOMES": str(outcomes),
                "PYTHONPATH": f"{suite}{os.pathsep}{HERE}",
                "HF_HUB_OFFLINE": "1",
            }
            run = subprocess.run(
                command, cwd=suite, env=environment, capture_output=True, text=True, check=False
            )
            assert outcomes.is_file(), run.stdout + run.stderr
            found.append(json.loads(outcomes.read_text()))
        return found[0], found[1]

    return run

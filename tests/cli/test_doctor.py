"""``magic-fast doctor``."""

from __future__ import annotations

import json

import pytest

import magic_fast as mf
from magic_fast.cli import main


def test_names_every_backend_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for backend in mf.backends():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{backend.name} ")]
        assert ("yes" if backend.available else str(backend.reason)) in line
    assert f"magic_fast {mf.__version__}" in printed


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MAGIC_FAST_NUM_THREADS", "1")
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [backend["name"] for backend in told["backends"]] == [b.name for b in mf.backends()]
    assert told["environment"]["MAGIC_FAST_NUM_THREADS"] == "1"
    assert told["cpus"] >= 1

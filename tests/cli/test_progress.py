"""Progress: a bar on a terminal, seldom lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from magic_fast.cli import progress as module
from magic_fast.cli.progress import progress


def state(done: int, total: int = 4 * 10**9, tensor: str = "model.norm.weight") -> Any:
    return SimpleNamespace(done_bytes=done, total_bytes=total, tensor=tensor)


def test_quiet_reports_nowhere() -> None:
    with progress(quiet=True, title="merge") as report:
        assert report is None


def test_lines_come_at_most_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress(quiet=False, title="merge", stream=stream) as report:
        assert report is not None
        for second, done in ((0, 0), (9, 10**9), (10, 10**9), (11, 2 * 10**9), (21, 3 * 10**9)):
            now[0] = 100.0 + second
            report(state(done))
    assert stream.getvalue().splitlines() == [
        "merge: 1.00 GB of 4.00 GB, 100 MB/s, 30.0 s left",
        "merge: 3.00 GB of 4.00 GB, 143 MB/s, 7.0 s left",
    ]


def test_no_bytes_yet_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress(quiet=False, title="merge", stream=stream) as report:
        assert report is not None
        now[0] = 20.0
        report(state(0))
    assert stream.getvalue().startswith("merge: 0 B of 4.00 GB")


def test_json_is_one_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress(quiet=False, title="merge", style="json", stream=stream) as report:
        assert report is not None
        for seconds in (0.5, 1.25):
            now[0] = 5.0 + seconds
            report(state(int(seconds * 1000), total=2000))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {
            "done_bytes": done,
            "total_bytes": 2000,
            "tensor": "model.norm.weight",
            "seconds": seconds,
        }
        for done, seconds in ((500, 0.5), (1250, 1.25))
    ]


@pytest.mark.parametrize("settings", [{"style": "none"}, {"style": "json", "quiet": True}])
def test_no_progress_at_all(settings: dict[str, Any]) -> None:
    with progress(title="merge", **{"quiet": False} | settings) as report:
        assert report is None


def test_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress(quiet=False, title="merge", stream=stream) as report:
        assert report is not None
        report(state(2 * 10**9, tensor="[red]name"))
    assert "merge" in stream.getvalue()
    assert "2.0/4.0 GB" in stream.getvalue()

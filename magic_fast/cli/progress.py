"""How far a merge is: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from magic_fast.report.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from magic_fast.api import Progress as State

Report = Callable[["State"], None]
SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(
    *, quiet: bool, title: str, style: str = "auto", stream: TextIO | None = None
) -> Iterator[Report | None]:
    """Yields what to pass as ``progress=``: None if quiet. Writes to standard error."""
    stream = stream or sys.stderr
    if quiet or style == "none":
        yield None
    elif style == "json":
        yield _Json(stream)
    elif stream.isatty():
        with _bar(title, stream) as report:
            yield report
    else:
        yield _Lines(title, stream)


class _Lines:
    """A plain line at most every ten seconds; a short merge prints none."""

    def __init__(self, title: str, stream: TextIO) -> None:
        self.title, self.stream = title, stream
        self.start = self.last = time.monotonic()

    def __call__(self, state: State) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        seconds = now - self.start
        left = seconds * (state.total_bytes / state.done_bytes - 1) if state.done_bytes else 0.0
        self.stream.write(
            f"{self.title}: {format_bytes(state.done_bytes)} of {format_bytes(state.total_bytes)}, "
            f"{format_rate(state.done_bytes, seconds)}, {format_seconds(left)} left\n"
        )
        self.stream.flush()


class _Json:
    """One object a line: bytes done, bytes in all, the tensor, and seconds since the start."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.start = stream, time.monotonic()

    def __call__(self, state: State) -> None:
        import json

        told = {
            "done_bytes": state.done_bytes,
            "total_bytes": state.total_bytes,
            "tensor": state.tensor,
            "seconds": round(time.monotonic() - self.start, 3),
        }
        self.stream.write(json.dumps(told) + "\n")
        self.stream.flush()


@contextmanager
def _bar(title: str, stream: TextIO) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", style="dim"),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(title, total=None, tensor="")

        def report(state: State) -> None:
            bar.update(
                task, completed=state.done_bytes, total=state.total_bytes, tensor=state.tensor
            )

        yield report

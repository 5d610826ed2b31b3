"""How far a command is: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TextIO

from magic_fast.report.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from magic_fast.calibration.sensitivity.measure import Evaluated
    from magic_fast.engine.output.report import Progress as State

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
        with _bar(title, stream) as bar:
            yield lambda state: bar(state.done_bytes, state.total_bytes, state.tensor)
    else:
        yield _Lines(title, stream)


@contextmanager
def evaluations(
    *, quiet: bool, title: str, style: str = "auto", stream: TextIO | None = None
) -> Iterator[Callable[[Evaluated], None] | None]:
    """The same for work that is counted, not weighed."""
    stream = stream or sys.stderr
    if quiet or style == "none":
        yield None
    elif style == "json":
        yield _Json(stream).count
    elif stream.isatty():
        with _bar(title, stream, counted=True) as bar:
            yield lambda state: bar(state.done, state.total, state.name)
    else:
        yield _Lines(title, stream).count


class _Lines:
    """A plain line at most every ten seconds; a short merge prints none."""

    def __init__(self, title: str, stream: TextIO) -> None:
        self.title, self.stream = title, stream
        self.start = self.last = time.monotonic()

    def __call__(self, state: State) -> None:
        done, total = state.done_bytes, state.total_bytes
        self._tell(
            done,
            total,
            f"{format_bytes(done)} of {format_bytes(total)}",
            partial(format_rate, done),
        )

    def count(self, state: Evaluated) -> None:
        self._tell(state.done, state.total, f"{state.done} of {state.total} evaluations")

    def _tell(
        self, done: int, total: int, text: str, rate: Callable[[float], str] | None = None
    ) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        seconds = now - self.start
        left = format_seconds(seconds * (total / done - 1) if done else 0.0)
        parts = [text, *([rate(seconds)] if rate else []), f"{left} left"]
        self.stream.write(f"{self.title}: {', '.join(parts)}\n")
        self.stream.flush()


class _Json:
    """One object a line: what is done, of how much, the tensor, and seconds since the start."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.start = stream, time.monotonic()

    def __call__(self, state: State) -> None:
        done, total = state.done_bytes, state.total_bytes
        self._tell({"done_bytes": done, "total_bytes": total, "tensor": state.tensor})

    def count(self, state: Evaluated) -> None:
        self._tell({"done": state.done, "total": state.total, "name": state.name})

    def _tell(self, told: dict[str, object]) -> None:
        import json

        seconds = round(time.monotonic() - self.start, 3)
        self.stream.write(json.dumps(told | {"seconds": seconds}) + "\n")
        self.stream.flush()


@contextmanager
def _bar(
    title: str, stream: TextIO, *, counted: bool = False
) -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *((MofNCompleteColumn(),) if counted else (DownloadColumn(), TransferSpeedColumn())),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", style="dim"),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(title, total=None, tensor="")

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, tensor=name)

        yield show

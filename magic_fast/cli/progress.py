"""How far a command is: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, TextIO

from magic_fast.report.units import format_bytes, format_rate, format_seconds

Report = Callable[[Any], None]
SECONDS_BETWEEN_LINES = 10.0
#: Fields of what is reported, by what work is measured in: done, of how much, where it is.
_BYTES = ("done_bytes", "total_bytes", "tensor")
_EVALUATIONS = ("done", "total", "name")


@contextmanager
def progress(
    *,
    quiet: bool,
    title: str,
    style: str = "auto",
    stream: TextIO | None = None,
    fields: tuple[str, str, str] = _BYTES,
) -> Iterator[Report | None]:
    """Yields what to pass as ``progress=``: None if quiet. Writes to standard error."""
    stream = stream or sys.stderr
    if quiet or style == "none":
        yield None
    elif style == "json":
        yield _Json(stream, fields)
    elif stream.isatty():
        with _bar(title, stream, counted=fields is _EVALUATIONS) as bar:
            yield lambda state: bar(*attrgetter(*fields)(state))
    else:
        yield _Lines(title, stream, fields)


#: The same for work that is counted, not weighed.
evaluations = partial(progress, fields=_EVALUATIONS)


class _Lines:
    """A plain line at most every ten seconds; a short merge prints none."""

    def __init__(self, title: str, stream: TextIO, fields: tuple[str, str, str]) -> None:
        self.title, self.stream, self.fields = title, stream, fields
        self.start = self.last = time.monotonic()

    def __call__(self, state: Any) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last, seconds = now, now - self.start
        done, total, _ = attrgetter(*self.fields)(state)
        parts = [f"{done} of {total} evaluations"]
        if self.fields is _BYTES:
            parts = [f"{format_bytes(done)} of {format_bytes(total)}", format_rate(done, seconds)]
        left = format_seconds(seconds * (total / done - 1) if done else 0.0)
        self.stream.write(f"{self.title}: {', '.join([*parts, left])} left\n")
        self.stream.flush()


class _Json:
    """One object a line: what is done, of how much, the tensor, and seconds since the start."""

    def __init__(self, stream: TextIO, fields: tuple[str, str, str]) -> None:
        self.stream, self.fields, self.start = stream, fields, time.monotonic()

    def __call__(self, state: Any) -> None:
        import json

        told = {field: getattr(state, field) for field in self.fields}
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

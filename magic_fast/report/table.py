"""One small table, shown with rich on a terminal and as aligned text everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO


@dataclass(frozen=True)
class Table:
    """Rows of text under columns.

    Attributes:
        title: one line above.
        columns: headings.
        rows: as many cells as columns in each.
        left: how many leading columns hold words; the others hold numbers and align right.
        note: one line below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    note: str = ""

    widths: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        cells = zip(self.columns, *self.rows, strict=True)
        object.__setattr__(self, "widths", tuple(max(map(len, column)) for column in cells))

    def lines(self) -> list[str]:
        """The table as plain text."""
        lines = [self.title] if self.title else []
        for row in (self.columns, tuple("-" * width for width in self.widths), *self.rows):
            cells = (
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, self.widths, strict=True))
            )
            lines.append("  ".join(cells).rstrip())
        return [*lines, self.note] if self.note else lines


def show(table: Table, stream: TextIO | None = None) -> None:
    """Writes ``table`` to ``stream`` (standard output)."""
    stream = stream or sys.stdout
    if not stream.isatty():
        stream.write("\n".join(table.lines()) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(
        title=table.title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption=table.note or None,
    )
    for i, column in enumerate(table.columns):
        grid.add_column(column, justify="left" if i < table.left else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(cell) for cell in row))
    Console(file=stream).print(grid)

"""Tables, summaries and the model card, from reports made by hand."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import yaml

from magic_fast.engine.output.card import model_card
from magic_fast.engine.output.report import MergeReport, TensorReport
from magic_fast.report.summary import deviation_table, inspect_table, report_lines
from magic_fast.report.table import Table, show


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tensor(
    name: str, before: float | None, after: float | None, rows_repaired: int = 0
) -> TensorReport:
    return TensorReport(
        name=name,
        shape=(4, 2),
        rows=4,
        calibrated=after is not None,
        coefficient_min=0.5,
        coefficient_mean=0.75,
        coefficient_max=1.0,
        magnitude_before=before,
        magnitude_after=after,
        rows_repaired=rows_repaired,
    )


def report(*tensors: TensorReport, warnings: tuple[str, ...] = ()) -> MergeReport:
    return MergeReport(
        out="/somewhere/merged",
        method="ties",
        backend="native",
        seconds=2.0,
        bytes_read=3 * 10**9,
        bytes_written=10**9,
        peak_memory_bytes=10**8,
        tensors=list(tensors),
        warnings=list(warnings),
    )


def test_plain_table_is_aligned_text() -> None:
    stream = io.StringIO()
    show(Table("Title", ("name", "n"), [("a", "1"), ("bcdef", "20")], note="Note"), stream)
    assert stream.getvalue() == "Title\nname    n\n-----  --\na       1\nbcdef  20\nNote\n"


def test_table_without_rows() -> None:
    assert Table("", ("name", "n"), []).lines() == ["name  n", "----  -"]


def test_terminal_table_shows_markup_as_text() -> None:
    stream = Terminal()
    show(Table("Title", ("name", "n"), [("[bold]x[/bold]", "1")]), stream)
    assert "[bold]x[/bold]" in stream.getvalue()
    assert "Title" in stream.getvalue()


def test_deviations_are_ordered_by_ratio() -> None:
    """0.25 is further from 1 than 3 is, a vanished tensor the furthest; unknown ones are out."""
    table = deviation_table(
        [
            tensor("near", 1.1, 1.0),
            tensor("third", 3.0, 1.2),
            tensor("quarter", 0.25, 0.9),
            tensor("unknown", None, None),
            tensor("gone", 0.0, 0.0),
            tensor("broken", float("nan"), None),
        ],
        top=3,
    )
    assert [row[0] for row in table.rows] == ["gone", "quarter", "third"]
    assert table.rows[1] == ("quarter", "0.250", "0.900", "0.500 0.750 1.000")
    assert table.title == "Largest deviations in magnitude (3 of 4 tensors)"


def test_report_lines() -> None:
    lines = report_lines(
        report(tensor("a", 2.0, 1.0, rows_repaired=1), tensor("b", 1.0, None), warnings=("odd",))
    )
    assert lines == [
        "Wrote /somewhere/merged: 2 tensors by ties on backend native.",
        "2.0 s, 3.00 GB read and 1.00 GB written (2.00 GB/s), peak memory 100 MB.",
        "Calibrated 4 rows of 1 tensors, 1 of them left as merged (nothing to scale).",
        "Warning: odd",
    ]


def test_inspect_table_puts_the_largest_first() -> None:
    def statistics(name: str, norm: float, magnitude: float | None) -> Any:
        return SimpleNamespace(
            name=name,
            shape=(2, 3),
            norms=(norm, 1.0),
            cosines=[[1.0, 0.25], [0.25, 1.0]],
            sign_conflict=0.5,
            magnitude=magnitude,
            row_deviation=None if magnitude is None else 0.1,
            magnitude_before=None,
        )

    table = inspect_table([statistics("small", 2.0, 1.5), statistics("large", 9.0, 0.5)])
    assert table.rows == [
        ("large", "2x3", "9 1", "0.25", "50.0%", "0.500", "0.100"),
        ("small", "2x3", "2 1", "0.25", "50.0%", "1.500", "0.100"),
    ]
    without = inspect_table([statistics("one", 2.0, None)], top=1)
    assert "magnitude" not in without.columns


def test_model_card_has_front_matter_and_recipe() -> None:
    recipe = "merge_method: ties\nbase_model: a/base\n"
    card = model_card(
        report(tensor("a", 2.0, 1.0), tensor("b", 1.0, None)),
        models=["a/base", "a/expert", "a/base"],
        recipe=recipe,
        versions={"magic_fast": "1.2.3"},
    )
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["a/base", "a/expert"],
        "library_name": "transformers",
        "tags": ["merge", "magic_fast"],
    }
    assert body.startswith("\n# merged\n")
    assert f"```yaml\n{recipe}```" in body
    assert "1 of 2 tensors were calibrated" in body
    assert "Made with magic_fast 1.2.3." in body
    assert "2.0" not in body  # no times: the same merge gives the same card

"""Every method has its row, and docs/catalog.md is what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from magic_fast.cli import main
from magic_fast.methods import catalog
from magic_fast.methods.parameters import METHODS, available_methods
from magic_fast.methods.recipes import RECIPES


def test_every_method_has_its_row() -> None:
    assert set(catalog.ROWS) == set(METHODS) == set(available_methods())
    for name, row in catalog.ROWS.items():
        assert row.summary and row.use_when and row.paper, name
        assert (name in RECIPES) == (not row.reads) == (not row.held), name


def test_document_is_generated() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "catalog.md"
    assert document.read_text() == "\n".join(catalog.markdown()) + "\n"


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("average", "1"),
        ("ties", "2"),
        ("dare_ties", "1"),
        ("breadcrumbs", "2"),
        ("sce", "2"),
        ("ramplus_tl", "2"),
    ],
)
def test_reads(name: str, reads: str) -> None:
    assert catalog.entry(name).reads == reads


def test_majority_takes_one_more() -> None:
    assert catalog.entry("ties").reads_presets["magic"] == "3"


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in available_methods())
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert [m["name"] for m in listed] == list(available_methods())
    assert main(["methods", "ties"]) == 0
    out = capsys.readouterr().out
    assert "lambda/scale (Python: scale)" not in out and "density = 0.2; 1.0 under mergekit" in out
    assert main(["methods", "tyes"]) == 2
    assert "Did you mean 'ties'" in capsys.readouterr().err

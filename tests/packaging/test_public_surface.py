"""What others write down, names, keywords and options, is what was recorded; it may only grow."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from support import public_surface as surface

ADVICE = "Meant? python tests/support/public_surface.py records it, unless a promise would break."


def test_signatures() -> None:
    assert surface.signatures() == (surface.FOLDER / "signatures.txt").read_text(), ADVICE


def test_keys_of_the_yaml() -> None:
    assert surface.yaml_keys() == (surface.FOLDER / "yaml.txt").read_text(), ADVICE


# argparse words some headings by the version of Python.
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="recorded with argparse of Python 3.11")
def test_helps() -> None:
    for command, text in surface.helps().items():
        assert text == surface.path_of(command).read_text(), f"{command}: {ADVICE}"


def test_every_option_stays() -> None:
    """In any version of Python: each option that a recorded help names is one of the parser."""
    for command, text in surface.helps().items():
        recorded = surface.path_of(command).read_text()
        words = {w.strip(",.[]()") for w in recorded.split() if w.startswith(("--", "[--"))}
        assert {w for w in words if w not in text} == set(), command


@pytest.mark.parametrize(
    "name", ["merge(experts)", "merge(calibrate)", "MergeConfig", "InputError"]
)
def test_promises_are_read(name: str) -> None:
    assert name in surface.promises(surface.signatures())


def test_promises_of_the_yaml_are_read() -> None:
    assert "configuration: merge_method" in surface.promises(surface.yaml_keys())


def test_a_lost_keyword_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(surface, "FOLDER", tmp_path)
    (tmp_path / "signatures.txt").write_text("def merge(\n    base\n    more=1\n    -> x\n)\n")
    assert surface.main() == 1


def test_a_changed_default_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = surface.signatures()

    def trim(x: int, rule: str = "other") -> argparse.Namespace:
        raise AssertionError

    monkeypatch.setattr(surface.mf, "trim", trim)
    assert surface.signatures() != before

"""Importing the package costs next to nothing; each name is looked up in its room on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import magic_fast as mf

HEAVY = ("torch", "triton", "numpy", "pydantic", "rich", "yaml", "safetensors", "transformers")


def loaded_by(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import magic_fast; magic_fast.__version__, dir(magic_fast), magic_fast.InputError",
        "import magic_fast.recipe",
        "import magic_fast.cli.program as p; p.build_parser().format_help()",
    ],
)
def test_imports_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_the_check_sees_a_heavy_import() -> None:
    assert "numpy" in loaded_by("import numpy")


@pytest.mark.parametrize("room", ["magic_fast.checkpoint", "magic_fast.config"])
def test_rooms_without_torch(room: str) -> None:
    assert "torch" not in loaded_by(f"import {room}")


@pytest.mark.parametrize("name", mf.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mf, name) is not None
    assert name in dir(mf)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'magic_fast' has no attribute 'merg'"):
        mf.merg  # noqa: B018

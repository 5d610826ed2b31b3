"""Which room may import which: downward only, over every import statement in the tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import house

# Lower may not import higher; rooms of one rank know nothing of each other.
RANK = {
    "errors": -1,
    "_version": -1,
    "recipe": 0,
    "models": 0,  # what a tensor is to its model
    "plugins": 1,  # what others register, entry points of installed packages
    "reference": 1,
    "kernels": 1,
    "_native": 1,
    "checkpoint": 1,
    "ops": 2,
    "spectral": 2,  # factorisations by matrix products
    "methods": 3,
    "calibration": 3,
    "adapters": 3,
    "config": 4,
    "engine": 4,
    "huggingface": 4,  # data sets and models by the library of their makers
    "planning": 5,  # from a configuration to what the engine runs
    "api": 6,
    "report": 7,
    "integrations": 7,
    "magic_fast": 7,  # the public names
    "cli": 8,
    "__main__": 9,
}


def upward(room: str, imported: str) -> bool:
    """Whether ``room`` importing ``imported`` goes against the layers."""
    if room == imported or imported == "_version":
        return False
    if room == "kernels":
        return True
    return RANK[room] <= RANK[imported]


def room_of(module: str) -> str:
    """``magic_fast.ops.checks`` → ``ops``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "magic_fast"


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and room of every import of ours in ``source``."""
    for line, name in house.imported(source, module):
        room = room_of(name)
        yield line, room if room in RANK else "magic_fast"  # `from magic_fast import merge`


def faults(source: str, module: str) -> list[str]:
    room = "magic_fast" if module == "magic_fast.__init__" else room_of(module)
    assert room in RANK, f"{module} is in a room that RANK does not know: say where it stands"
    return [
        f"{module}:{line} imports {imported}"
        for line, imported in imports(source, module)
        if upward(room, imported)
    ]


def test_imports_go_downward(root: Path) -> None:
    found = [
        fault for path, module in house.modules(root) for fault in faults(path.read_text(), module)
    ]
    assert not found, "\n".join(found)


def test_every_room_is_seen(root: Path) -> None:
    rooms = {room_of(module) for _, module in house.modules(root)}
    assert {"cli", "report", "ops", "reference", "kernels", "recipe", "checkpoint"} <= rooms


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("magic_fast.ops.x", "from magic_fast.engine import run"),
        ("magic_fast.ops.x", "def f():\n    import magic_fast.api"),
        ("magic_fast.reference.x", "from ..ops import merge"),
        ("magic_fast.checkpoint.x", "from magic_fast.reference import merge"),
        ("magic_fast.methods.x", "from magic_fast import merge"),
        ("magic_fast.engine.x", "from magic_fast import config"),
        ("magic_fast.api.x", "from magic_fast.cli import main"),
        ("magic_fast.api.x", "from magic_fast.report import card"),
        ("magic_fast.report.x", "import magic_fast as mf"),
        ("magic_fast.kernels.x", "from magic_fast.errors import InputError"),
    ],
)
def test_upward_import_is_found(module: str, source: str) -> None:
    assert faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("magic_fast.cli.x", "import magic_fast as mf"),
        ("magic_fast.ops.x", "from .checks import check"),
        ("magic_fast.engine.x", "from magic_fast.checkpoint import reader"),
        ("magic_fast.report.x", "from magic_fast.api import MergeReport"),
    ],
)
def test_downward_import_is_not(module: str, source: str) -> None:
    assert not faults(source, module)

"""No circle of files, no long file, no full folder, no room that calls a backend by its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support import house

WING = ("magic_fast/ops/native", "magic_fast/ops/registry.py")  # where the backend lives


def test_circles_of_files(root: Path) -> None:
    assert house.circles(house.edges(house.sources_of(root))) == []


def test_a_circle_is_seen() -> None:
    sources = {
        "magic_fast.a.x": "from magic_fast.a.y import f",
        "magic_fast.a.y": "if TYPE_CHECKING:\n    from . import z",
        "magic_fast.a.z": "def f():\n    import magic_fast.a.x",
        "magic_fast.b": "from magic_fast.a import x",
    }
    assert house.circles(house.edges(sources)) == [{f"magic_fast.a.{m}" for m in "xyz"}]


def test_long_files(root: Path) -> None:
    assert house.long_files(root) == {}


def test_full_folders(root: Path) -> None:
    assert house.full_folders(root) == {}


def test_no_room_names_the_native_backend(root: Path) -> None:
    naming = {
        path.relative_to(root).as_posix()
        for path, _ in house.modules(root)
        if not path.relative_to(root).as_posix().startswith(WING)
        and house.names_native(path.read_text())
    }
    assert not naming


@pytest.mark.parametrize(
    "source",
    [
        "from magic_fast.ops.native.backend import NativeBackend",
        "from magic_fast.ops.native.search import select_over",
        "def f(job):\n    return merge(job, backend='native')",
        "if chosen.name == 'native':\n    pass",
        "import magic_fast.ops.native.backend.jobs",
        "NATIVE = frozenset({'native'})",
        "usable = NativeBackend()",
        "import_module('magic_fast.ops.native.backend.backend')",
        "from magic_fast.ops import native",
        "from ..ops.native import backend",
        "from .native import search",
        "from . import native as core",
        "import magic_fast.ops.native as core",
        "from magic_fast import _native",
        "import_module('magic_fast._native')",
        "BackendSpec('x', 'magic_fast.ops.native.backend:NativeBackend')",
        "getattr(module, 'NativeBackend')",
        "NAME = 'native'\nif one.name == NAME:\n    pass",
        "if one.name.startswith('nat'):\n    pass",
        "if one.name.endswith('ative'):\n    pass",
        "if one.name == 'na' + 'tive':\n    pass",
        "if one.name == f'na{\"tive\"}':\n    pass",
        "if one.name == '{}tive'.format('na'):\n    pass",
        "if one.name == 'na%s' % 'tive':\n    pass",
        "if one.name == ''.join(['na', 'tive']):\n    pass",
        "if one.name.upper() == 'NATIVE':\n    pass",
        "if one.name.encode() == b'native':\n    pass",
        "if one.name in 'native cuda'.split():\n    pass",
        "if one.name == 'evitan'[::-1]:\n    pass",
        "match one.name:\n    case 'native':\n        pass",
        "use = {'native': 1}[one.name]",
        "options = dict(native=True)",
        "def merge(job, native=False):\n    pass",
        "merge(job, backend=SPECS[0].name)",
        "merge(job, backend=registry.SPECS[0].name)",
    ],
)
def test_a_named_backend_is_seen(source: str) -> None:
    assert house.names_native(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""What ``native`` does."""\nimport torch',
        "def f():\n    '''Runs on the native backend.'''\n    return 1",
        "x = 'the native core is missing'",
        "from magic_fast import ops",
        "'an alternative' + name",
        "words = 'runs natively'.split()",
    ],
)
def test_prose_is_not_a_name(source: str) -> None:
    ast.parse(source)
    assert not house.names_native(source)

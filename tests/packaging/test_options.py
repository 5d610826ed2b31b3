"""The options that many calls take have their defaults in one place each."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import magic_fast as mf
from magic_fast.api.options import MergeOptions
from magic_fast.planning.options import RunOptions

DEFAULTS = {f.name: f.default for kind in (MergeOptions, RunOptions) for f in fields(kind)}
#: Options by the same name that mean something else there.
OTHERS = {
    ("calibrate_features", "preset"),
    ("row_norms", "row_axis"),  # there is no layout that could tell it
    ("row_stats", "row_axis"),
    ("sensitive_layers", "seed"),  # of resamples, which are always drawn
    ("sensitive_layers_of_checkpoints", "seed"),
    ("trim", "seed"),
}


def spelled_out(source: str) -> list[str]:
    """Defaults of options that stand as literals, as `function(name=value)`; None, False and ''
    say that nothing was given."""
    literals = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        args = node.args
        plain = [*args.posonlyargs, *args.args]
        pairs = [*zip(plain[::-1], args.defaults[::-1]), *zip(args.kwonlyargs, args.kw_defaults)]  # noqa: B905 - defaults belong to the last
        for parameter, default in pairs:
            name = parameter.arg
            if name not in DEFAULTS or default is None or (node.name, name) in OTHERS:
                continue
            if isinstance(default, ast.Attribute | ast.Name):
                continue
            if not (isinstance(default, ast.Constant) and default.value in (None, False, "")):
                literals.append(f"{node.name}({name}={ast.unparse(default)})")
    return literals


def test_no_call_spells_a_default(root: Path) -> None:
    found = {
        path.name: literals
        for room in ("api", "planning")
        for path in sorted((root / "magic_fast" / room).rglob("*.py"))
        if (literals := spelled_out(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize("default", ["'error'", "5 * 10**9", "'auto'"])
def test_a_spelled_default_is_seen(default: str) -> None:
    source = f"def f(x, *, nonfinite={default}, executor={default}): ..."
    assert len(spelled_out(source)) == 2


def test_calls_agree() -> None:
    """Whatever public call takes an option takes it with the same default."""
    different = []
    for name in mf.__all__:
        call = getattr(mf, name)
        if not inspect.isfunction(call):
            continue
        for parameter in inspect.signature(call).parameters.values():
            key, default = parameter.name, parameter.default
            if key in DEFAULTS and default is not parameter.empty and (name, key) not in OTHERS:
                if default != DEFAULTS[key]:
                    different.append(f"{name}({key}={default!r})")
    assert different == []

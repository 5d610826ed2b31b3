"""Each setting of a calibration has its default in one place; the variants are listed in one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from magic_fast.calibration.samples import Sampling
from magic_fast.recipe import RowCalibration, Variant
from support import house

VARIANTS = {str(variant) for variant in Variant}
COUNTS = set(vars(Sampling())) | {f"--{n.replace('_', '-')}" for n in vars(Sampling())}


def prose_of(tree: ast.AST) -> set[int]:
    """Docstrings, by the id of their node."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def is_clamp(node: ast.AST) -> bool:
    """The bounds of a coefficient as a pair, or as text."""
    if isinstance(node, ast.Tuple | ast.List):
        found = [x.value if isinstance(x, ast.Constant) else None for x in node.elts]
        return found == list(RowCalibration.clamp or ())
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = "".join(node.value.split())
        return any(bounds in text for bounds in ("0.1,10", "[0.1,10"))
    return False


def lists_variants(node: ast.AST) -> bool:
    """Two or more variants side by side, as strings."""
    inner = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ())
    return len({x.value for x in inner if isinstance(x, ast.Constant)} & VARIANTS) > 1


def is_count(node: ast.AST) -> bool:
    """A number of samples, a batch size or a length as somebody's default."""
    if isinstance(node, ast.AnnAssign | ast.Assign):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
        names = {t.id for t in targets if isinstance(t, ast.Name)}
        return bool(names & COUNTS) and _is_number(node.value)
    if isinstance(node, ast.arguments):
        plain = [*node.posonlyargs, *node.args]
        pairs = [*zip(reversed(plain), reversed(node.defaults), strict=False)]
        pairs += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d]
        return any(a.arg in COUNTS and _is_number(d) for a, d in pairs)
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        defaults = [k.value for k in node.keywords if k.arg == "default"]
        return node.args[0].value in COUNTS and any(map(_is_number, defaults))
    return False


def _is_number(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def found(source: str, rule: object) -> Iterator[int]:
    tree = ast.parse(source)
    prose = prose_of(tree)
    for node in ast.walk(tree):
        if id(node) not in prose and rule(node):  # type: ignore[operator]
            yield getattr(node, "lineno", 0)


@pytest.mark.parametrize(
    ("rule", "places"),
    [
        (is_clamp, ["magic_fast.recipe.found"]),
        (lists_variants, []),
        (is_count, ["magic_fast.calibration.samples"] * 3),
    ],
    ids=["clamp", "variants", "samples"],
)
def test_one_place(rule: object, places: list[str], root: Path) -> None:
    spelled = [
        module for module, source in house.sources_of(root).items() for _ in found(source, rule)
    ]
    assert spelled == places


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (is_clamp, "def f(clamp=(0.1, 10.0)): ..."),
        (is_clamp, "add('--clamp', default='0.1, 10')"),
        (is_clamp, "text = 'bounds (default: 0.1,10)'"),
        (lists_variants, "choices = ('wsc', 'manifold', 'sphere')"),
        (lists_variants, "x: Literal['manifold', 'spectral']"),
        (lists_variants, "codes = {'manifold': 0, 'sphere': 2}"),
        (is_count, "def f(*, samples: int = 64): ..."),
        (is_count, "def f(a, batch_size=8): ..."),
        (is_count, "class A:\n    max_length: int = 512"),
        (is_count, "add('--batch-size', default=8)"),
    ],
)
def test_a_second_place_is_found(rule: object, source: str) -> None:
    assert list(found(source, rule))

"""Entry points of other packages: loaded once, a broken one named and left out."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from magic_fast.plugins import entry_points_of

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with entry points of the group ``magic_fast.toys`` on the path."""

    def put(package: str, entries: str, source: str = "") -> None:
        site = tmp_path / package
        facts = site / f"{package}-1.0.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[magic_fast.toys]\n{entries}\n")
        (site / f"{package}.py").write_text(source)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, package, raising=False)
        importlib.invalidate_caches()

    entry_points_of.cache_clear()
    yield put
    entry_points_of.cache_clear()


def test_what_a_package_offers_is_loaded(install: Install) -> None:
    install("toy_a", "doll = toy_a:DOLL\nball = toy_a:BALL", "DOLL, BALL = 'doll', 'ball'")
    loaded, left_out = entry_points_of("magic_fast.toys")
    assert loaded == {"ball": "ball", "doll": "doll"} and list(loaded) == ["ball", "doll"]
    assert left_out == {}


def test_it_is_loaded_once(install: Install) -> None:
    install("toy_once", "doll = toy_once:DOLL", "DOLL = object()")
    assert entry_points_of("magic_fast.toys") is entry_points_of("magic_fast.toys")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no luck')", "toy_bad:DOLL cannot be loaded: RuntimeError: no luck"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named"),
        ("", "AttributeError"),
        ("def (", "SyntaxError"),
    ],
    ids=["raises", "lacks a module", "lacks the name", "is no Python"],
)
def test_a_broken_one_is_named_and_left_out(
    install: Install, caplog: pytest.LogCaptureFixture, source: str, reason: str
) -> None:
    install("toy_bad", "doll = toy_bad:DOLL", source)
    install("toy_good", "ball = toy_good:BALL", "BALL = 'ball'")
    with caplog.at_level(logging.WARNING, logger="magic_fast"):
        loaded, left_out = entry_points_of("magic_fast.toys")
    assert loaded == {"ball": "ball"}
    assert list(left_out) == ["doll"] and reason in left_out["doll"]
    assert "entry point doll of magic_fast.toys is left out" in caplog.text


def test_a_name_that_two_packages_offer_is_nobodys(install: Install) -> None:
    install("toy_one", "doll = toy_one:DOLL", "DOLL = 1")
    install("toy_two", "doll = toy_two:DOLL", "DOLL = 2")
    loaded, left_out = entry_points_of("magic_fast.toys")
    assert loaded == {}
    assert left_out == {"doll": "several packages offer it: toy_one:DOLL, toy_two:DOLL"}


def test_no_entry_points_no_names() -> None:
    entry_points_of.cache_clear()
    assert entry_points_of("magic_fast.nobody_offers_this") == ({}, {})

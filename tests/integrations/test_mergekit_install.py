"""What an installation into mergekit replaces, says and takes back."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

import magic_fast as mf
from magic_fast.integrations import mergekit as ours
from magic_fast.integrations.mergekit.calls import REPLACED

LINE = (
    "mergekit 0.1.5: replaced linear, task_arithmetic, ties, dare_ties, dare_linear, breadcrumbs, "
    "breadcrumbs_ties, della, della_linear, karcher; added average, consensus_ta, emr_unified, "
    "iso_c, iso_cts, magmax, magnitude_prune, pcb, star, tsv_m; left as they are: multislerp, "
    "nearswap, ram, ramplus_tl, sce, slerp, nuslerp, passthrough, model_stock, arcee_fusion"
)


def test_replaces_says_so_and_takes_it_back(
    registry: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(registry)
    caplog.set_level(logging.INFO, logger="magic_fast")
    done = mf.integrations.mergekit.install()
    assert [record.getMessage() for record in caplog.records] == [LINE]
    assert set(done.replaced) == set(REPLACED)
    assert all(registry[name] is not before[name] for name in done.replaced)
    assert all(registry[name] is before[name] for name in done.left)
    assert list(registry) == [*before, *done.added]
    mf.integrations.mergekit.uninstall()
    assert list(registry.items()) == list(before.items())


def test_specs_gain_calibrate_and_nothing_else(registry: dict[str, Any]) -> None:
    before = {name: method.spec for name, method in registry.items()}
    with ours.install():
        for name in REPLACED:
            old, new = before[name], registry[name].spec
            assert (new.contract, new.reference_url) == (old.contract, old.reference_url)
            gained = [p.name for p in new.parameters[len(old.parameters) :]]
            assert new.parameters[: len(old.parameters)] == old.parameters
            assert gained == ([] if name in ("linear", "karcher") else ["calibrate"])


def test_an_inner_installation_leaves_the_outer_one(registry: dict[str, Any]) -> None:
    theirs = registry["ties"]
    with ours.install():
        fast = registry["ties"]
        with ours.install() as inner:
            assert inner.replaced
            assert registry["ties"] is fast
        assert registry["ties"] is fast
    assert registry["ties"] is theirs


def test_what_another_put_there_since_stays(registry: dict[str, Any]) -> None:
    theirs, another = registry["ties"], object()
    ours.install()
    registry["ties"] = another
    ours.uninstall()
    assert registry["ties"] is another
    registry["ties"] = theirs


def test_unknown_release(registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(registry)
    monkeypatch.setattr(ours, "version", lambda name: "0.2.0")
    with pytest.raises(mf.InputError) as caught:
        ours.install()
    assert str(caught.value) == (
        f"version of mergekit: expected one of {', '.join(sorted(ours._PROTOCOLS))}, got 0.2.0. "
        "Nothing was replaced: another release may call its methods in another way. Install one of "
        "these, or run the YAML by `magic-fast merge`."
    )
    assert registry == before


def test_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ours, "version", absent)
    message = (
        "package 'mergekit': expected it for magic_fast.integrations.mergekit, got none installed. "
        "Install the extra: pip install 'magic_fast[mergekit]'."
    )
    with pytest.raises(mf.InputError) as caught:
        ours.install()
    assert str(caught.value) == message
    from magic_fast.cli import main

    assert main(["mergekit-yaml", "merge.yml", "out"]) == 2
    assert capsys.readouterr().err == f"magic-fast: error: {message}\n"


def test_the_front_imports_nothing_of_mergekit() -> None:
    import subprocess

    code = (
        "import sys, magic_fast as mf; mf.integrations.mergekit; print('mergekit' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_unknown_integration() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'megakit'"):
        mf.integrations.megakit  # noqa: B018

"""Several merges in one file (mergekit-multi): order, names, results, what stops them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import magic_fast as mf
from magic_fast.cli import main
from magic_fast.config.series import read_series
from support.models import assert_same, load

Capture = pytest.CaptureFixture[str]


def series(models: Path) -> str:
    """The last result uses two others, of which one uses the other; written back to front."""
    return f"""\
merge_method: slerp
base_model: first
models: [{{model: second}}]
parameters: {{t: 0.5}}
dtype: float32
---
name: second
merge_method: ties
base_model: {models}/base
models:
  - {{model: first, parameters: {{density: 0.5}}}}
  - {{model: {models}/expert-2, parameters: {{density: 0.5}}}}
dtype: float32
---
name: first
merge_method: linear
models:
  - {{model: {models}/expert-0, parameters: {{weight: 1}}}}
  - {{model: {models}/expert-1, parameters: {{weight: 2}}}}
dtype: float32
"""


@pytest.fixture
def file(tiny_models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "series.yml"
    path.write_text(series(tiny_models))
    return path


def test_the_results_are_those_of_one_merge_after_the_other(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["merge", str(file), str(tmp_path / "out"), "-q"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "series.yml"]
    (tmp_path / "by-hand").mkdir()
    monkeypatch.chdir(tmp_path / "by-hand")  # where the names are folders
    by_name = {merge.name or "last": merge.config for merge in read_series(file.read_text())}
    assert list(by_name) == ["first", "second", "last"]
    for name, config in by_name.items():
        mf.merge_checkpoints(config, name)
    assert_same(load(Path("last")), load(tmp_path / "out"))


def test_intermediate_results_stay_where_they_are_asked_for(file: Path, tmp_path: Path) -> None:
    reports = mf.merge_series(file, tmp_path / "out", intermediate=tmp_path / "parts")
    assert list(reports) == ["first", "second", None]
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["first", "second"]
    assert mf.verify_checkpoint(tmp_path / "parts" / "first").ok


def test_an_interrupted_series_goes_on(
    file: Path, tmp_path: Path, tiny_models: Path, capsys: Capture
) -> None:
    """The last merge fails for want of a file; what was made before it is verified, not redone."""
    text = file.read_text().replace(f"{tiny_models}/expert-2", str(tmp_path / "later"))
    file.write_text(text)
    command = ["merge", str(file), str(tmp_path / "out"), "-q"]
    assert main(command) == 2
    assert "missing checkpoint" in capsys.readouterr().err
    first = tmp_path / ".out.intermediate" / "first"
    made = {p.name: p.stat().st_mtime_ns for p in first.iterdir()}
    (tmp_path / "later").symlink_to(tiny_models / "expert-2")
    assert main(command) == 2
    assert "expected it missing or empty" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in first.iterdir()} == made
    assert main([*command, "--resume"]) == 0
    assert not first.exists()
    mf.merge_series(series(tiny_models), tmp_path / "afresh")
    assert_same(load(tmp_path / "out"), load(tmp_path / "afresh"))


def test_dry_run_plans_what_can_be_known(file: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["merge", str(file), str(tmp_path / "out"), "--dry-run"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "== first: linear\n" in printed
    assert "== second: ties after first\n" in printed
    assert main([*command, "--json"]) == 0
    merges = json.loads(capsys.readouterr().out)["merges"]
    assert [(m["name"], m["after"], "plan" in m) for m in merges] == [
        ("first", [], True),
        ("second", ["first"], False),
        (None, ["first", "second"], False),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["series.yml"]


LAST = "merge_method: linear\nmodels: [{model: a}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{LAST}---\n{LAST}",
            "several results for the configuration: expected each document without a name once, "
            "got 2. Give each merge but the last result a 'name:' of its own.",
        ),
        (
            f"name: x\n{LAST}",
            "no last result for the configuration: expected one document without a name, got a "
            "name in each. Remove the 'name:' of the one that OUT is to hold.",
        ),
        (
            f"name: x\n{LAST}---\nname: x\n{LAST}---\n{LAST}",
            "several results for the configuration: expected each name 'x' once, got 2. Give each "
            "merge but the last result a 'name:' of its own.",
        ),
        (
            f"name: ../x\n{LAST}---\n{LAST}",
            "bad name for the configuration, line 1: expected the name of a folder, got '../x'. "
            "Use letters, digits, '-' and '_'.",
        ),
        (
            f"name: x\nmerge_method: linear\nmodels: [{{model: y}}]\n---\nname: y\n"
            f"merge_method: linear\nmodels: [{{model: x}}]\n---\n{LAST}",
            "merges that wait for one another for the configuration: expected an order in which "
            "each uses earlier ones, got x uses y, y uses x. Correct the names.",
        ),
    ],
)
def test_faulty_series(text: str, message: str) -> None:
    with pytest.raises(mf.ConfigError) as caught:
        read_series(text)
    assert str(caught.value) == message


def test_a_fault_names_the_line_of_its_document(file: Path) -> None:
    text = file.read_text().replace("merge_method: ties", "merge_method: tise")
    with pytest.raises(mf.ConfigError, match="line 8"):
        read_series(text)


def test_intermediate_of_a_single_merge_is_refused(
    tiny_models: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "one.yml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: {tiny_models}/base}}]\n")
    assert main(["merge", str(path), str(tmp_path / "o"), "--intermediate", str(tmp_path)]) == 2
    assert "expected several documents, got one. Remove the option." in capsys.readouterr().err

"""What the README shows, run."""

from __future__ import annotations

import contextlib
import glob
import io
import re
import shlex
from pathlib import Path

import pytest
import yaml

from adapters.adapter_files import draw_lora, write_peft
from magic_fast.cli import main
from magic_fast.methods import catalog
from magic_fast.methods.registry import built_in

RUN_ELSEWHERE = {"pip install ."}  # test_wheel.py installs


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text()


def test_python_prints_what_it_says(readme: str) -> None:
    (code,) = blocks(readme, "python")
    (expected,) = blocks(readme, "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == expected


def test_yaml_is_the_example(readme: str, root: Path) -> None:
    (shown,) = blocks(readme, "yaml")
    assert yaml.safe_load(shown) == yaml.safe_load((root / "examples/ties_wsc.yml").read_text())


def test_commands_run(
    readme: str,
    root: Path,
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a folder with the example and checkpoints, in the order in which the README has them."""
    (tmp_path / "checkpoints").symlink_to(tiny_models)
    (tmp_path / "examples").symlink_to(root / "examples")
    for seed, name in enumerate(("math", "code")):
        write_peft(tmp_path / "lora" / name, draw_lora(seed))
    monkeypatch.chdir(tmp_path)
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.M))
    lines = [line for block in blocks(readme, "sh") for line in block.splitlines() if line]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {"make demo", "make test"} <= {" ".join(words) for words in commands}
    for words in commands:
        if words[0] == "magic-fast":
            expanded = [w for word in words[1:] for w in sorted(glob.glob(word)) or [word]]
            assert main(expanded) == 0, words
        elif words[0] == "make":
            assert set(words[1:]) <= targets, words
        else:
            assert " ".join(words) in RUN_ELSEWHERE, words
    assert (tmp_path / "out/config.json").is_file()
    assert (tmp_path / "calibrated/config.json").is_file()


def test_methods_are_generated(readme: str) -> None:
    """By ``python -m magic_fast.methods.catalog readme``."""
    table = [
        line
        for line in readme.split("## Methods")[1].split("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    expected = list(catalog.readme_table())
    assert table == expected
    names = [line.split("`")[1] for line in expected[2:]]
    assert sorted(names) == sorted(built_in())


def test_links_lead_somewhere(root: Path) -> None:
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_contributing_lists_what_ci_runs(root: Path) -> None:
    """In the same words: every make line of its command block stands in .ci/run."""
    script = (root / ".ci/run").read_text()
    (commands,) = blocks((root / "CONTRIBUTING.md").read_text(), "sh")
    for line in commands.splitlines():
        assert " ".join(shlex.split(line, comments=True)) in script

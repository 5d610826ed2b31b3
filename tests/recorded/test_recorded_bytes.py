"""The native backend's bytes are those that are committed, on every CPU; and the net can fail.

What lies behind a difference: ``make same-bytes BEFORE=…`` names the cases on all backends. New
bytes on purpose: ``PYTHONPATH=tests python -m recorded.run > tests/recorded/native.json``, with
the reason in the commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import magic_fast as mf
from recorded import compare, run
from recorded.cases import CASES
from support.backends import why_not

HERE = Path(__file__).parent
RECORDED: dict[str, dict[str, str]] = json.loads((HERE / "native.json").read_text())
EXACT = [name for name, case in CASES.items() if case.recorded is not None]

needs_native = pytest.mark.skipif(
    why_not("native") is not None, reason=f"backend native: {why_not('native')}"
)


def test_every_exact_case_is_recorded() -> None:
    assert sorted(EXACT) == sorted(RECORDED) and len(EXACT) >= 60


@needs_native
@pytest.mark.parametrize("name", EXACT)
def test_the_bytes_are_the_recorded_ones(name: str) -> None:
    case = CASES[name]
    assert case.recorded is not None
    assert run.parts_of(case, case.recorded) == RECORDED[name]


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512", "neon"))
@pytest.mark.parametrize("threads", (1, 3))
def test_instruction_set_and_threads_change_nothing(isa: str, threads: int, tmp_path: Path) -> None:
    from magic_fast import _native

    if isa not in _native.build_config()["supported_isas"]:
        pytest.skip(f"instruction set {isa}: not of this CPU or build")
    chosen = {"MAGIC_FAST_CPU_ISA": isa, "MAGIC_FAST_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "recorded.run"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, **chosen, "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == RECORDED


def nudged(real: Any) -> Any:
    """A merge whose scale is a hair larger."""
    return lambda *args, scale=None, **options: real(
        *args, scale=(1.0 if scale is None else scale) * (1 + 2**-20), **options
    )


@needs_native
def test_a_planted_change_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mf, "merge", nudged(mf.merge))
    for name in ("ties-f32", "dare_ties-mergekit-bf16", "average-f32"):
        assert run.parts_of(CASES[name], "native") != RECORDED[name], name


@needs_native
def test_a_planted_change_of_a_file_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of the weights; a record that says something else; a blank."""
    real, name = mf.merge_checkpoints, "checkpoints-ties"
    planted: dict[str, Callable[[bytes], bytes]] = {
        "model.safetensors": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "magic_fast.json": lambda data: data.replace(b'"xxh3_64"', b'"xxh3_32"'),
        "config.json": lambda data: data + b" ",
    }
    for file, change in planted.items():

        def merged(
            config: Any, out: str, file: str = file, change: Any = change, **more: Any
        ) -> None:
            real(config, out, **more)
            (Path(out) / file).write_bytes(change((Path(out) / file).read_bytes()))

        monkeypatch.setattr(mf, "merge_checkpoints", merged)
        found = run.parts_of(CASES[name], "native")
        assert {p for p in found if found[p] != RECORDED[name][p]} == {file}


def python_of(folder: Path, planted: str = "") -> str:
    """An interpreter that runs ``planted`` when it starts."""
    (folder / "sitecustomize.py").write_text(planted)
    script = folder / "python"
    path = f'PYTHONPATH="{folder}:$PYTHONPATH"'
    script.write_text(f'#!/bin/sh\n{path} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


PLANTED = """
import magic_fast as mf
real = mf.merge
mf.merge = lambda *args, **options: real(*args, **{**options, "scale": 0.999})
"""


@pytest.mark.skipif(os.name != "posix", reason="the planted interpreter is a shell script")
@pytest.mark.parametrize(
    ("planted", "only", "status", "said"),
    [
        ("", "average-f32", 0, "0 differ"),
        (PLANTED, "average-f32", 1, "differs: average-f32 @ torch: the values"),
        ("", "no such case", 1, "0 cases compared"),
    ],
)
def test_the_comparison_fails_where_it_should(
    planted: str, only: str, status: int, said: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(HERE / "compare.py"), python_of(tmp_path, planted)]
    done = subprocess.run([*command, "--only", only], capture_output=True, text=True)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout + done.stderr


def test_what_raises_or_is_missing_differs() -> None:
    raised = {"a": {"raised": "InputError: x"}}
    assert compare.differences(raised, raised) == [
        "a: before raised InputError: x; after raised InputError: x"
    ]
    assert compare.differences({"a": {"": "1"}}, {}) == ["a: only before"]
    assert compare.differences({"a": {"": "1"}}, {"a": {"": "1", "f": "2"}}) == ["a: f"]
    assert compare.differences({"a": {"": "1"}}, {"a": {"": "1"}}) == []

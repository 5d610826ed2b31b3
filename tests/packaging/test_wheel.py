"""The wheel holds what it must, and installs where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("magic_fast", "kernels", "examples", "csrc")


def build_wheel(root: Path, folder: Path, **environment: str) -> Path:
    """A wheel of a clean copy of the sources, built with the packages of this environment."""
    tree = folder / "tree"
    tree.mkdir()
    for file in SOURCES:
        shutil.copy(root / file, tree / file)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(root / name, tree / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(tree)]
    # the CUDA kernels take minutes to compile, and CI's own environment has them
    environment = os.environ | {"MAGIC_FAST_CUDA": "0"} | environment
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def pure_wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where no compiler works."""
    folder = tmp_path_factory.mktemp("pure")
    compilers = {"CC": "/bin/false", "CXX": "/bin/false"}
    return build_wheel(root, folder, MAGIC_FAST_REQUIRE_NATIVE="0", **compilers)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_source_file_is_in(pure_wheel: Path, root: Path) -> None:
    wanted = {str(path.relative_to(root)) for path in (root / "magic_fast").rglob("*.py")}
    wanted |= {"magic_fast/py.typed", "magic_fast/examples/ties_wsc.yml"}
    wanted |= {"magic_fast/models/architectures.jsonl"}
    wanted |= {f"magic_fast/models/diffusion/{name}.json" for name in ("families", "names")}
    wanted |= {
        f"magic_fast/{path.relative_to(root)}"
        for room in ("kernels", "examples")
        for path in (root / room).rglob("*.py")
    }
    assert wanted <= names(pure_wheel)


def test_nothing_else_at_the_top(pure_wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(pure_wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"magic_fast"}


def test_works_without_a_compiler(pure_wheel: Path, tmp_path: Path) -> None:
    """Installed alone it imports, says why the native backend is out, and merges on torch."""
    assert not [name for name in names(pure_wheel) if name.endswith(".so")]
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import magic_fast as mf, magic_fast.kernels, torch\n"
        "native = next(b for b in mf.backends() if b.name == 'native')\n"
        "assert not native.available and native.reason, native\n"
        "print(mf.__file__)\n"
        "print(mf.merge(torch.zeros(2), [torch.ones(2)], 'average').tolist())\n"
    )
    # -S: without it the editable install, if any, would lend its extension to this copy.
    paths = (str(tmp_path / "site"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    file, merged = run.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert merged == "[1.0, 1.0]"


@pytest.mark.slow
def test_compiled_wheel_holds_the_extension(root: Path, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    wheel = build_wheel(root, tmp_path, MAGIC_FAST_REQUIRE_NATIVE="1", MAGIC_FAST_CUDA="0")
    assert [n for n in names(wheel) if n.startswith("magic_fast/_native") and n.endswith(".so")]


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_an_nvcc_that_fails(root: Path, tmp_path: Path, wanted: str) -> None:
    """An error where the kernels are insisted on; else everything but them is there."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'no such card' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    environment = {
        "PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}",
        "MAGIC_FAST_CUDA": wanted,
        "MAGIC_FAST_REQUIRE_NATIVE": "0",
        "CC": "false",
        "CXX": "false",
    }
    if wanted == "1":
        with pytest.raises(AssertionError, match="no such card"):
            build_wheel(root, tmp_path, **environment)
        return
    wheel = build_wheel(root, tmp_path, **environment)
    assert not [n for n in names(wheel) if n.endswith(".so")]

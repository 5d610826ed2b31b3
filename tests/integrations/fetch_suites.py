"""Brings other libraries' own tests, from their source distributions, into ``.suites``: they are
run with our functions in place and are no part of this project.

    python tests/integrations/fetch_suites.py [FOLDER]
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

#: Packages whose sources have tests; the version is the one installed here.
SUITES = ("mergekit", "peft")
FOLDER = Path(__file__).resolve().parents[2] / ".suites"


def folder_of(package: str, folder: Path = FOLDER) -> Path:
    return folder / f"{package}-{version(package)}"


def fetch(package: str, folder: Path = FOLDER) -> Path:
    """The unpacked source distribution of the installed version."""
    target = folder_of(package, folder)
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
             ":all:", "--no-build-isolation", "--dest", scratch, f"{package}=={version(package)}"],
            check=True,
        )  # fmt: skip
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        (unpacked,) = (p for p in Path(scratch).iterdir() if p.is_dir())
        # Tests import each other as a package.
        (unpacked / "tests" / "__init__.py").touch()
        unpacked.rename(target)
    return target


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name in SUITES:
        print(fetch(name, where))

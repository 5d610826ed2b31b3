"""Runs the table in this interpreter, and prints what came out as JSON.

    PYTHONPATH=tests python -m recorded.run                 the committed part
    PYTHONPATH=tests python -m recorded.run --all           every case on every backend

It uses public calls alone, so that it runs on commits whose inner parts lie elsewhere; what lets
GPU kernels run on a CPU comes from the tree of the package that this interpreter imports.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

Found = dict[str, dict[str, str]]  # "case @ backend" → part → digest


def _of_its_tree(name: str) -> ModuleType:
    """tests/support/NAME.py beside the package that is imported here."""
    package = importlib.util.find_spec("magic_fast")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parents[1] / "tests" / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"its_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulate() -> None:
    """CUDA's kernels compiled for the host, Triton's interpreted; before either is imported."""
    _of_its_tree("emulator").switch_on()
    interpreter = _of_its_tree("interpreter")
    if interpreter.switch_on():
        interpreter.quicken()


def parts_of(case: Any, backend: str) -> dict[str, str]:
    """Part of the result → digest; of values one part, of an output one a file."""
    from recorded.digests import digest, folder_digests

    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            result = case.call(None if backend == "auto" else backend)
            if isinstance(result, Path):
                return folder_digests(result)
            return {"": digest(result)}
        finally:
            os.chdir(before)


def committed(only: str = "*") -> Found:
    """The cases whose bits are the same on every CPU."""
    from recorded.cases import CASES

    return {
        name: parts_of(case, case.recorded)
        for name, case in CASES.items()
        if case.recorded is not None and fnmatch.fnmatch(name, only)
    }


def everything(only: str = "*", backends: str = "all") -> tuple[Found, dict[str, str]]:
    """The cases on every backend that runs here; and backend → why it does not."""
    import magic_fast as mf
    from recorded.cases import CASES

    absent = {b.name: b.reason for b in mf.backends() if b.reason is not None}
    found: Found = {}
    for name, case in CASES.items():
        if not fnmatch.fnmatch(name, only):
            continue
        for backend in case.backends:
            if backend not in absent and (backends == "all" or backend in backends.split(",")):
                try:
                    parts = parts_of(case, backend)
                except (
                    Exception
                ) as error:  # a case that does not run must not look like one that does
                    parts = {"raised": f"{type(error).__name__}: {error}"}
                found[f"{name} @ {backend}"] = parts
                if sys.stderr.isatty():
                    print(f"\r{len(found)} {name} @ {backend}\x1b[K", end="", file=sys.stderr)
    return found, absent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="the recorded cases of this interpreter's package")
    parser.add_argument("--all", action="store_true", help="all backends and inexact cases too")
    parser.add_argument("--only", default="*", help="names of cases, with wildcards")
    parser.add_argument("--backends", default="all", help="all, or some, with commas")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if chosen.all:
        emulate()
        found, absent = everything(chosen.only, chosen.backends)
        print(json.dumps({"found": found, "absent": absent}))
    else:
        print(json.dumps(committed(chosen.only), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

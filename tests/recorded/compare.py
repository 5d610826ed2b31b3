"""Whether this tree makes the bytes of another commit, built on this machine.

    python tests/recorded/compare.py OTHER/.venv/bin/python --only 'ties*' --backends native,auto

Runs the table of ``cases.py`` in both interpreters: all backends that run here (the GPUs' kernels
on the CPU), and methods whose bits are those of BLAS and of this CPU. Says which cases differ, and
in what. Exit status 1 on any difference, a case that raises, or none that ran.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
#: Sums of BLAS and LAPACK depend on the number of threads; a GPU would take the emulator's place.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MAGIC_FAST_NUM_THREADS": "2",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
Digests = Mapping[str, Mapping[str, str]]


def results(python: str, only: str, backends: str) -> dict[str, Any]:
    """What the table gives in one interpreter."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [python, "-m", "recorded.run", "--all", "--only", only, "--backends", backends]
    with tempfile.TemporaryDirectory() as folder:  # nothing of a tree is imported by accident
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{python}: the table did not run:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def differences(before: Digests, after: Digests) -> list[str]:
    """In words, one line a case."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            found.append(f"{name}: only {'after' if name in after else 'before'}")
            continue
        was, now = before[name], after[name]
        parts = sorted(p for p in was.keys() | now.keys() if was.get(p) != now.get(p))
        raised = [f"{w} raised {r['raised']}" for w, r in (("before", was), ("after", now))
                  if "raised" in r]  # fmt: skip
        if raised:
            found.append(f"{name}: {'; '.join(raised)}")
        elif parts:
            found.append(f"{name}: {', '.join(p or 'the values' for p in parts)}")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="compare the bytes of two commits, case by case")
    parser.add_argument("before", help="the Python of the other checkout, built")
    parser.add_argument("--only", default="*", help="names of cases, with wildcards")
    parser.add_argument("--backends", default="all", help="all, or some, with commas; "
                        "`auto` are the cases without a choice")  # fmt: skip
    chosen = parser.parse_args(arguments)
    with ThreadPoolExecutor(2) as pool:
        pythons = (chosen.before, sys.executable)
        table = partial(results, only=chosen.only, backends=chosen.backends)
        before, after = pool.map(table, pythons)
    for name, reason in sorted((before["absent"] | after["absent"]).items()):
        print(f"not run: {name}: {reason}")
    different = differences(before["found"], after["found"])
    for line in different:
        print(f"differs: {line}")
    ran = Counter(name.rpartition(" @ ")[2] for name in after["found"])
    where = ", ".join(f"{backend} {count}" for backend, count in ran.items())
    print(f"{ran.total()} cases compared ({where or 'nothing'}), {len(different)} differ")
    return 1 if different or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

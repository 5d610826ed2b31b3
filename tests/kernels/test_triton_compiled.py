"""The kernels compiled for real GPUs, without one: registers, spills, 16-byte accesses.

The interpreter shares neither types nor layouts with the compiler, so this is where a kernel that
only runs in Python is caught. In a process of its own: Triton is bound to one of the two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def _compiled(*flags: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "magic_fast.kernels.inspect", "--json", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _check(reports: list[dict[str, Any]]) -> None:
    assert reports
    for r in reports:
        # one program, once a select; and scores of many experts beside the sums of a row
        spills = r["kernel"] == "find_cuts" or (
            r["kernel"] == "merge_rows_scratch pcb" and r["experts"] > 4
        )
        if not spills:
            assert r["stack"] <= 8, r  # ptxas parks a predicate or two now and then (K = 1)
        # 64 Ki registers a multiprocessor: a program must fit at all
        assert r["registers"] * 32 * r["warps"] <= 65536, r
        if r["kernel"].startswith(("merge_", "scale_")):
            # many experts with trimmed values beside them: half as many elements a thread
            least = 8 if r["experts"] > 4 and "sum" not in r["kernel"] else 16
            assert min(r["load_bytes"], r["store_bytes"]) >= least, r


def test_merge_compiles_for_sm_90_with_16_byte_accesses() -> None:
    _check(_compiled("--arch", "90", "--experts", "2", "--kernel", "merge_blocks sum"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("experts", ["1", "3", "8"])
def test_every_kernel_compiles_without_spills(experts: str, arch: str) -> None:
    _check(_compiled("--arch", arch, "--experts", experts))


@pytest.mark.slow
def test_long_lists_of_experts_compile() -> None:
    """Above 8 experts spills are allowed, wrong types are not."""
    reports = _compiled("--arch", "90", "--experts", "17", "--kernel", "merge_blocks")
    assert [Path(r["kernel"]).name for r in reports]

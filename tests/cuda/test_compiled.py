"""What nvcc made of the kernels, against limits; nothing of it runs here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_KERNELS = 60  # of one architecture


@pytest.fixture(scope="module")
def found() -> list[Any]:
    spec = importlib.util.spec_from_file_location(
        "registers", ROOT / "benchmarks" / "gpu" / "registers.py"
    )
    assert spec is not None and spec.loader is not None
    registers = importlib.util.module_from_spec(spec)
    sys.modules["registers"] = registers  # dataclasses look their module up
    spec.loader.exec_module(registers)
    program, path = registers.cuobjdump(), registers.extension()
    if path is None:
        pytest.skip("operation cuda: magic_fast._cuda was not built: no nvcc")
    if program is None:
        pytest.skip("operation cuda: no cuobjdump")
    kernels: list[Any] = registers.kernels(program, path)
    return kernels


def test_machine_code_of_both_generations(found: list[Any]) -> None:
    names = {arch: {k.name for k in found if k.arch == arch} for arch in ("sm_80", "sm_90")}
    assert names["sm_80"] == names["sm_90"]
    assert {f"merge_fast<{k}, {t}>" for k in range(1, 9) for t in ("plain", "trims")} <= names[
        "sm_90"
    ]
    assert 40 < len(names["sm_90"]) <= MOST_KERNELS


def test_no_kernel_touches_local_memory(found: list[Any]) -> None:
    """No spills, no arrays with an index at run time."""
    assert [k for k in found if k.stack or k.local] == []


def test_registers_leave_two_blocks_a_multiprocessor(found: list[Any]) -> None:
    assert [k for k in found if 2 * 128 * k.registers > 65536] == []


def test_accesses_are_16_bytes_wide(found: list[Any]) -> None:
    walks = ("merge_", "rows_")
    both = [k for k in found if k.name.startswith(walks)]
    reading = ("scan<", "count_equals<", "norm_sums", "vote_sum", "held_counts", "keep_varied")
    reads = [k for k in found if k.name.startswith(reading)]
    assert both and [k for k in both if min(k.load, k.store) < 16] == []
    assert reads and [k for k in reads if k.load < 16] == []


def test_doctor_tells_what_was_built(found: list[Any]) -> None:
    """In a process of its own, without the emulated kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "MAGIC_FAST_CUDA_EMULATED"}
    done = subprocess.run(
        [sys.executable, "-m", "magic_fast", "doctor"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("cuda "))
    assert "sm_80 sm_90 PTX of sm_90, nvcc " in line

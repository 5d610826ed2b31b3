"""The native CPU backend against the memory's speed: time, bytes by the byte model, GB/s, and the
share of the merge-shaped bandwidth (K + 1 streams read, one written, no arithmetic) of the same
run.

    python benchmarks/cpu/bench.py [--rows N] [--cols N] [--rounds N] [--threads N] [--only WORD]
                                   [--json FILE]

All variants of one K run interleaved on the same tensors, medians are shown; `out` exists and was
touched before. Before anything is timed, each result is checked against the PyTorch reference on a
part of the rows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from magic_fast import _native
from magic_fast.ops.backend import Job
from magic_fast.ops.native import NativeBackend
from magic_fast.ops.torch_backend import TorchBackend
from magic_fast.recipe import (
    Contributors,
    Recipe,
    Reduce,
    Rescale,
    RowCalibration,
    Trim,
    TrimRule,
    Vote,
)

HERE = Path(__file__).resolve().parent


def recipes(k: int) -> dict[str, Recipe]:
    """The methods of the table, for ``k`` experts."""
    ones = (1.0,) * k
    voted = {"vote": Vote.MASS, "contributors": Contributors.AGREEING}
    return {
        "task_arithmetic": Recipe((0.3,) * k),
        "ties": Recipe(
            ones,
            Trim(TrimRule.MAGNITUDE, density=(0.2,) * k),
            reduce=Reduce.WEIGHTED_MEAN,
            **voted,
        ),
        "dare_ties": Recipe(
            ones,
            Trim(TrimRule.RANDOM, density=(0.5,) * k, seed=42),
            rescale=Rescale.KEEP_PROBABILITY,
            **voted,
        ),
        "della": Recipe(
            ones,
            Trim(TrimRule.RANKED, density=(0.5,) * k, epsilon=(0.15,) * k, seed=42),
            reduce=Reduce.WEIGHTED_MEAN,
            **voted,
        ),
    }


@dataclass
class Variant:
    """One row of the table. ``streams``: how often N elements of 16 bits move, by the byte
    model."""

    name: str
    streams: int
    run: Callable[[], object]


def yardstick(streams: list[torch.Tensor], out: torch.Tensor, threads: int) -> Callable[[], None]:
    """The merge-shaped stream over the very same memory; None without a C compiler."""
    folder = tempfile.mkdtemp()
    library = f"{folder}/merge_shape.so"
    command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, str(HERE / "merge_shape.c"), "-o", library], check=True)
    function = ctypes.CDLL(library).merge_shape
    pointers = (ctypes.c_void_p * len(streams))(*[s.data_ptr() for s in streams])
    n = ctypes.c_size_t(out.numel())
    return lambda: function(pointers, len(streams), ctypes.c_void_p(out.data_ptr()), n, threads)


def data(k: int, rows: int, cols: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A bf16 base and ``k`` experts that differ by small steps, many of them equal in magnitude."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(rows, cols, generator=generator) * 0.02).bfloat16()
    experts = []
    for _ in range(k):
        step = torch.randn(rows, cols, generator=generator) * 0.0015
        experts.append((base.float() + step).bfloat16())
    return base, experts


def check(backend: NativeBackend, job: Job) -> None:
    """Native against the reference on the first rows."""
    rows = min(64, job.base.shape[0])

    def part(out: torch.Tensor) -> Job:
        calibration = job.calibration
        if calibration is not None:
            calibration = RowCalibration(rows, calibration.cols)
        return Job(
            job.base[:rows],
            [e[:rows] for e in job.experts],
            job.recipe,
            out,
            job.name,
            calibration=calibration,
        )

    got, want = (torch.empty_like(job.base[:rows]) for _ in range(2))
    backend.merge(part(got))
    TorchBackend().merge(part(want))
    # one step of bfloat16 is all that two float32 computations may differ by
    wrong = ~torch.isclose(got.float(), want.float(), rtol=2**-7, atol=1e-7)
    assert not wrong.any(), f"{job.name}: {int(wrong.sum())} elements differ from the reference"


def variants(
    k: int, rows: int, cols: int, threads: int, only: str
) -> tuple[list[Variant], Callable[[], None]]:
    backend = NativeBackend(threads=threads)
    base, experts = data(k, rows, cols)
    out, merged = torch.zeros_like(base), torch.zeros_like(base)
    calibration = RowCalibration(rows, cols)
    found = []
    for name, recipe in recipes(k).items():
        reads = 2 if recipe.needs_select else 1
        for wsc in (False, True):
            label = f"{name}{' + WSC' if wsc else ''}"
            if only not in label:
                continue
            job = Job(base, experts, recipe, out, calibration=calibration if wsc else None)
            check(backend, job)
            found.append(Variant(label, reads * (k + 1) + 1, lambda job=job: backend.merge(job)))
            if reads == 2 and not wsc:
                found.append(Variant("  select alone", k + 1, lambda job=job: backend.select(job)))
    backend.merge(Job(base, experts, recipes(k)["task_arithmetic"], merged))
    job = Job(base, experts, recipes(k)["task_arithmetic"], out, calibration=calibration)
    if only in "WSC alone":
        found.append(Variant("WSC alone", k + 3, lambda: backend.calibrate(job, merged)))
    return found, yardstick([base, *experts], out, threads)


def measure(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, interleaved."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_:  # the first is warm-up
                found.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def small_tensors(threads: int, rounds: int) -> dict[str, object]:
    """2000 tensors of 4096 elements, K = 8, TIES, one call."""
    k, count = 8, 2000
    backend, recipe = NativeBackend(threads=threads), recipes(k)["ties"]
    jobs = []
    for i in range(count):
        base = (torch.randn(4096) * 0.02).bfloat16()
        experts = [(base.float() + torch.randn(4096) * 0.0015).bfloat16() for _ in range(k)]
        jobs.append(Job(base, experts, recipe, torch.zeros_like(base), name=f"norm.{i}"))
    seconds = measure([lambda: backend.merge_many(jobs)], rounds)[0]
    each = seconds / count / k * 1e6
    print(f"{count} tensors of 4096, TIES, K = {k}, one call: {each:.2f} us per tensor and expert")
    return {"name": "small tensors", "k": k, "microseconds_per_tensor_and_expert": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads = options.threads or _native.num_threads()
    print(f"{platform.processor() or platform.machine()}, {_native.isa()}, {threads} threads")
    print(f"{options.rows} x {options.cols} bf16; medians of {options.rounds} interleaved rounds")
    elements = options.rows * options.cols
    results: list[dict[str, object]] = []
    for k in options.experts:
        found, stream = variants(k, options.rows, options.cols, threads, options.only)
        seconds = measure([stream, *[v.run for v in found]], options.rounds)
        ceiling = (k + 2) * elements * 2 / seconds[0] / 1e9
        print(f"\nK = {k}; merge-shaped bandwidth {ceiling:.1f} GB/s")
        print(f"{'':<26}{'ms':>9}{'MB':>9}{'GB/s':>8}{'share':>8}")
        for variant, t in zip(found, seconds[1:], strict=True):
            moved = variant.streams * elements * 2
            rate = moved / t / 1e9
            print(
                f"{variant.name:<26}{t * 1e3:>9.2f}{moved / 1e6:>9.0f}{rate:>8.2f}"
                f"{rate / ceiling:>7.0%}"
            )
            results.append(
                {"name": variant.name, "k": k, "seconds": t, "bytes": moved}
                | {"GBps": rate, "merge_shaped_GBps": ceiling, "share": rate / ceiling}
            )
    if options.only in "small tensors":
        print()
        results.append(small_tensors(threads, options.rounds))
    if options.json:
        facts = {"isa": _native.isa(), "threads": threads, "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": facts, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

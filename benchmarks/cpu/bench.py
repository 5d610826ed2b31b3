"""The native CPU backend against the memory's speed: time, bytes by the byte model, GB/s, and the
share of the merge-shaped bandwidth (K + 1 streams read, one written, no arithmetic) of the same
run.

    python benchmarks/cpu/bench.py [--rows N] [--cols N] [--rounds N] [--threads N] [--only WORD]
                                   [--json FILE] [--markdown FILE]

All variants of one K run interleaved on the same tensors, medians are shown; `out` exists and was
touched before. Before anything is timed, each result is checked against the PyTorch reference on a
part of the rows. `x 1 thread`: how many times as fast as one thread in the same rounds;
`extra MiB`: by how much the process's resident memory grew at its highest during one call.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from magic_fast import _native
from magic_fast.ops.job import Job
from magic_fast.ops.native.backend import NativeBackend
from magic_fast.ops.torch.backend import TorchBackend
from magic_fast.recipe import RowCalibration

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402 - benchmarks/machine.py
from recipes import recipes  # noqa: E402 - benchmarks/recipes.py


@dataclass
class Variant:
    """One row of the table. ``streams``: how often N elements of 16 bits move, by the byte
    model."""

    name: str
    streams: int
    run: Callable[[], object]
    alone: Callable[[], object]  # the same on one thread


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
) -> tuple[list[Variant], Callable[[], None], Callable[[], None]]:
    """The rows of one K, and the merge-shaped stream on ``threads`` threads and on one."""
    backend, single = NativeBackend(threads=threads), NativeBackend(threads=1)
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
            found.append(
                Variant(
                    label,
                    reads * (k + 1) + 1,
                    lambda job=job: backend.merge(job),
                    lambda job=job: single.merge(job),
                )
            )
            if reads == 2 and not wsc:
                found.append(
                    Variant(
                        "- its select alone",
                        k + 1,
                        lambda job=job: backend.select(job),
                        lambda job=job: single.select(job),
                    )
                )
    backend.merge(Job(base, experts, recipes(k)["task_arithmetic"], merged))
    job = Job(base, experts, recipes(k)["task_arithmetic"], out, calibration=calibration)
    if only in "WSC alone":
        found.append(
            Variant(
                "WSC alone",
                k + 3,
                lambda: backend.calibrate(job, merged),
                lambda: single.calibrate(job, merged),
            )
        )
    streams = [base, *experts]
    return found, yardstick(streams, out, threads), yardstick(streams, out, 1)


def extra_memory(function: Callable[[], object]) -> float:
    """MiB by which the highest resident size of one call exceeds the size before it."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kib(field: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is not there for this one
    clear.write_text("5")  # forgets the highest size so far
    before = kib("VmRSS")
    function()
    return (kib("VmHWM") - before) / 1024


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


def small_tensors(threads: int, rounds: int) -> tuple[dict[str, object], str]:
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
    text = f"{count} tensors of 4096, TIES, K = {k}, one call: {each:.2f} us per tensor and expert"
    return {"name": "small tensors", "k": k, "microseconds_per_tensor_and_expert": each}, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    threads = options.threads or _native.num_threads()
    facts = machine.facts("torch") | {"isa": _native.isa(), "threads": str(threads)}
    print(machine.line(facts))
    print(f"{options.rows} x {options.cols} bf16; medians of {options.rounds} interleaved rounds")
    elements = options.rows * options.cols
    results: list[dict[str, object]] = []
    lines: list[str] = []
    for k in options.experts:
        found, stream, stream_alone = variants(k, options.rows, options.cols, threads, options.only)
        functions = [stream, stream_alone, *[v.run for v in found], *[v.alone for v in found]]
        seconds = measure(functions, options.rounds)
        ceiling = (k + 2) * elements * 2 / seconds[0] / 1e9
        lines += [
            "",
            f"K = {k}; merge-shaped bandwidth {ceiling:.1f} GB/s, "
            f"{seconds[1] / seconds[0]:.2f} times that of one thread",
            "",
            "| work | ms | MB | GB/s | share | x 1 thread | extra MiB |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        both, alone = seconds[2 : 2 + len(found)], seconds[2 + len(found) :]
        for variant, t, t1 in zip(found, both, alone, strict=True):
            moved = variant.streams * elements * 2
            rate = moved / t / 1e9
            extra = extra_memory(variant.run)
            lines.append(
                f"| {variant.name} | {t * 1e3:.2f} | {moved / 1e6:.0f} | {rate:.2f} "
                f"| {rate / ceiling:.0%} | {t1 / t:.2f} | {extra:.1f} |"
            )
            results.append(
                {"name": variant.name, "k": k, "seconds": t, "bytes": moved}
                | {"GBps": rate, "merge_shaped_GBps": ceiling, "share": rate / ceiling}
                | {"seconds_one_thread": t1, "extra_MiB": extra}
            )
    if options.only in "small tensors":
        row, text = small_tensors(threads, options.rounds)
        results.append(row)
        lines += ["", text]
    print("\n".join(lines))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": results}, indent=1) + "\n")
    if options.markdown:
        head = [
            "# The native CPU backend against the memory's speed",
            "",
            "`python benchmarks/cpu/bench.py " + " ".join(sys.argv[1:]) + "`",
            "",
            machine.line(facts),
            "",
            f"{options.rows} x {options.cols} bf16, medians of {options.rounds} interleaved "
            "rounds; share: of the merge-shaped bandwidth of the same rounds.",
        ]
        options.markdown.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()

"""The GPU backends against the copy bandwidth of the device, measured in the same run.

    python benchmarks/gpu/bench.py [--size 8192] [--backends cuda triton] [--only WORD]
                                   [--json FILE] [--markdown FILE]

Times are those of device events around replays of a CUDA graph (where a call can be captured, else
around the call), medians. Inputs rotate so that the L2 cache holds nothing of the next one. Bytes
are those of the byte model (benchmarks/README.md). Before anything is timed a part of the rows of
each result is checked against the reference. `predicted`: written down before any measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peers import AIMS as AIMS_OF_PEERS
from peers import peers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402 - benchmarks/machine.py
from recipes import recipes  # noqa: E402 - benchmarks/recipes.py

from magic_fast import ops  # noqa: E402
from magic_fast.ops.job import Job  # noqa: E402
from magic_fast.ops.registry import implementation, why_unavailable  # noqa: E402
from magic_fast.recipe import Recipe, RowCalibration  # noqa: E402

#: share of the copy bandwidth that is aimed at, and predicted: (cuda, triton) each
AIMS = {
    "task arithmetic + WSC, K = 8": ((0.85, 0.75), (0.85, 0.75)),
    "TIES q 0.2 + WSC, K = 3": ((0.75, 0.60), (0.74, 0.39)),
    "TIES q 0.2 + WSC, K = 8": ((0.65, 0.50), (0.72, 0.35)),
    "DARE-TIES + WSC, K = 8": ((0.50, 0.35), (0.40, 0.28)),
    "row norms + Gram, K = 8": ((0.85, 0.75), (0.90, 0.90)),
    "a block of Llama 8B, task arithmetic + WSC, K = 4": ((0.70, 0.55), (0.75, 0.60)),
}
COMPARED = "TIES q 0.2 + WSC, K = 8"
SMALL = "2000 tensors of 4096, task arithmetic, K = 4"
SMALL_AIMS = {"cuda": 60e-6, "triton": 150e-6}
SMALL_PREDICTED = {"cuda": 35e-6, "triton": 40e-6}
LLAMA_8B = [
    *[(4096, 4096)] * 2, *[(1024, 4096)] * 2, *[(14336, 4096)] * 2, (4096, 14336),
    *[(4096,)] * 2,
]  # fmt: skip


@dataclass
class Row:
    """``share`` of the copy bandwidth; ``times``: how many times as long as ours."""

    work: str
    backend: str
    seconds: float
    bytes: int = 0
    share: float | None = None
    aim: float | None = None
    predicted: float | None = None
    times: float | None = None
    extra_mib: float | None = None


def make_job(
    shape: Sequence[int], k: int, recipe: Recipe, seed: int, device: str, wsc: bool = True
) -> Job:
    draw = torch.Generator(device).manual_seed(seed)
    base = torch.randn(tuple(shape), generator=draw, device=device) * 0.02
    experts = []
    for _ in range(k):
        tau = torch.randn(tuple(shape), generator=draw, device=device) * 0.001
        experts.append((base + tau).bfloat16())
    base = base.bfloat16()
    rows = shape[0]
    calibration = RowCalibration(rows, base.numel() // rows) if wsc and len(shape) > 1 else None
    return Job(base, experts, recipe, torch.empty_like(base), "w", calibration=calibration)


class Clock:
    """Times on the device, or on the host where there is none (a smoke test)."""

    def __init__(self, device: str, seconds: float = 0.3) -> None:
        self.device, self._seconds = device, seconds

    def median(self, runs: Sequence[Callable[[], object]]) -> float:
        """Of each run in turn, for some time after a warm-up."""
        import time

        for run in runs:
            run()
        found: list[float] = []
        if self.device != "cuda":
            for run in runs:
                started = time.perf_counter()
                run()
                found.append(time.perf_counter() - started)
            return statistics.median(found)
        torch.cuda.synchronize()
        until = time.monotonic() + self._seconds
        while time.monotonic() < until or len(found) < 3 * len(runs):
            for run in runs:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                stop.record()
                stop.synchronize()
                found.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(found)

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """The run as a graph; itself where it cannot be captured, which is said."""
        if self.device != "cuda":
            return run
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = run()
        except RuntimeError as error:
            print(f"not captured: {error}".splitlines()[0], file=sys.stderr)
            torch.cuda.synchronize()
            return run
        graph.kept = kept  # what it works in lives as long as the graph
        return graph.replay


def copy_bandwidth(clock: Clock, nbytes: int) -> float:
    """Bytes read and written a second by a copy on the device."""
    pairs = []
    for _ in range(2):
        a = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=clock.device)
        pairs.append((a, torch.empty_like(a)))
    seconds = clock.median([lambda p=p: p[1].copy_(p[0]) for p in pairs])
    return 2 * nbytes / seconds


def check(jobs: Sequence[Job], backend: str) -> None:
    """A part of the rows of each result against the reference, by the selection that was used."""
    for job, stats in zip(jobs, ops.merge(jobs, backend=backend), strict=True):
        rows = min(job.out.shape[0], 32)
        width = job.out.numel() // job.out.shape[0]
        c = job.calibration
        part = replace(
            job, base=job.base[:rows], experts=[e[:rows] for e in job.experts],
            out=torch.empty_like(job.out[:rows]), selection=stats.selection,
            total=job.out.numel(), calibration=None if c is None else replace(c, rows=rows),
        )  # fmt: skip
        ops.merge([part], backend="torch")
        got, want = job.out[:rows].float(), part.out.float()
        bound = want.abs() * 2**-7 + 1e-7  # a unit in the last place of bfloat16
        wrong = int((~((got - want).abs() <= bound)).sum())
        assert wrong == 0, f"{job.name}: {wrong} of {rows * width} elements differ"


def bytes_of(jobs: Sequence[Job]) -> int:
    """By the byte model: one read, one more where a trim selects, one write."""
    total = 0
    for job in jobs:
        reads = 2 if job.recipe.needs_select else 1
        inputs = sum(x.numel() * x.element_size() for x in (job.base, *job.experts))
        total += reads * inputs + job.out.numel() * job.out.element_size()
    return total


def merges(
    work: str, sets: Sequence[Sequence[Job]], backend: str, clock: Clock, bandwidth: float
) -> Row:
    check(sets[0], backend)
    runs: Any = implementation(backend)
    replays = []
    for jobs in sets:
        devices = runs.prepare(jobs)
        replays.append(clock.captured(lambda d=devices: runs.launch(d)))
    seconds = clock.median(replays)
    row = Row(work, backend, seconds, bytes_of(sets[0]))
    row.share = row.bytes / seconds / bandwidth
    row.extra_mib = extra_memory(lambda: ops.merge(sets[0], backend=backend), clock.device)
    if work in AIMS:
        n = ("cuda", "triton").index(backend)
        row.aim, row.predicted = (pair[n] for pair in AIMS[work])
    return row


def extra_memory(run: Callable[[], object], device: str) -> float | None:
    """MiB of the device that one call takes beside what is there."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def row_statistics(
    work: str, sets: Sequence[Job], backend: str, clock: Clock, bandwidth: float
) -> Row:
    runs: Any = implementation(backend)
    replays = [clock.captured(lambda j=j: runs.row_stats(j, j.experts[0])) for j in sets]
    seconds = clock.median(replays)
    first = sets[0]
    size = sum(x.numel() * x.element_size() for x in (first.base, *first.experts))
    n = ("cuda", "triton").index(backend)
    aim, predicted = (pair[n] for pair in AIMS[work])
    return Row(work, backend, seconds, size, size / seconds / bandwidth, aim, predicted)


def many_small(backend: str, clock: Clock, device: str, count: int = 2000) -> Row:
    """Tensors of 4096 elements through a prepared table; preparing it is not in the time."""
    recipe = Recipe((0.3,) * 4)
    jobs = [make_job((4096,), 4, recipe, n, device, wsc=False) for n in range(count)]
    check(jobs[:8], backend)
    runs: Any = implementation(backend)
    (group,) = runs.groups_of(runs.prepare(jobs))
    seconds = clock.median([clock.captured(group.launch)])
    return Row(
        SMALL, backend, seconds, bytes_of(jobs), None, SMALL_AIMS[backend],
        SMALL_PREDICTED[backend],
    )  # fmt: skip


def compare(rows: list[Row], job: Job, clock: Clock, write: Callable[[], None]) -> None:
    """The peers of TIES + WSC (mergekit: without), those that are here; torch.compile, which may
    take minutes, last."""
    ours = min(r.seconds for r in rows if r.work == COMPARED)
    for name, make in peers(job, clock).items():
        try:
            call = make()
            seconds = 0.0 if isinstance(call, str) else clock.median([call])
        except RuntimeError as error:  # it needs more memory than there is, say
            call = str(error)
        if isinstance(call, str):
            print(f"{name}: absent: {call.splitlines()[0]}", file=sys.stderr)
        else:
            words = f"{name} (aim: {AIMS_OF_PEERS[name]:.0f} times)"
            rows.append(Row(COMPARED, words, seconds, times=seconds / ours))
            write()


def table(rows: Sequence[Row], bandwidth: float) -> list[str]:
    def percent(x: float | None) -> str:
        return "" if x is None else f"{100 * x:.0f} %"

    lines = [
        f"Copy on the device: {bandwidth / 1e9:.0f} GB/s read and written.",
        "",
        "| work | backend | µs | GB/s | share | aim | predicted | times ours | extra MiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        if r.work == SMALL:
            aim, predicted = (f"{x * 1e6:.0f} µs" for x in (r.aim or 0, r.predicted or 0))
        else:
            aim, predicted = percent(r.aim), percent(r.predicted)
        speed = f"{r.bytes / r.seconds / 1e9:.0f}" if r.bytes else ""
        times = "" if r.times is None else f"{r.times:.1f}"
        extra = "" if r.extra_mib is None else f"{r.extra_mib:.0f}"
        lines.append(
            f"| {r.work} | {r.backend} | {r.seconds * 1e6:.0f} | {speed} | {percent(r.share)} | "
            f"{aim} | {predicted} | {times} | {extra} |"
        )
    return lines


def measured(options: argparse.Namespace, clock: Clock, bandwidth: float) -> list[Row]:
    size, device = options.size, clock.device

    def square(k: int, kind: str, seed: int) -> list[Job]:
        return [make_job((size, size), k, recipes(k)[kind], seed, device)]

    works: dict[str, Callable[[int], list[Job]]] = {
        "task arithmetic + WSC, K = 8": lambda s: square(8, "task_arithmetic", s),
        "TIES q 0.2 + WSC, K = 3": lambda s: square(3, "ties", s),
        "TIES q 0.2 + WSC, K = 8": lambda s: square(8, "ties", s),
        "DARE-TIES + WSC, K = 8": lambda s: square(8, "dare_ties", s),
        "a block of Llama 8B, task arithmetic + WSC, K = 4": lambda s: [
            make_job([max(x * size // 8192, 1) for x in shape], 4, Recipe((0.3,) * 4), s, device)
            for shape in LLAMA_8B
        ],
    }
    rows: list[Row] = []
    for work, make in works.items():
        if options.only and options.only not in work:
            continue
        sets = [make(s) for s in range(options.sets)]
        for backend in options.backends:
            rows.append(merges(work, sets, backend, clock, bandwidth))
    gram = "row norms + Gram, K = 8"
    if not options.only or options.only in gram:
        jobs = [make_job((size, size), 8, Recipe((1.0,) * 8), s, device) for s in range(2)]
        rows += [row_statistics(gram, jobs, b, clock, bandwidth) for b in options.backends]
    if not options.only or options.only in SMALL:
        count = 2000 if size >= 1024 else 20
        rows += [many_small(b, clock, device, count) for b in options.backends]
    return rows


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the tensor")
    parser.add_argument("--sets", type=int, default=3, help="inputs that take turns")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--only", help="works with this in their name")
    parser.add_argument("--device", default="cuda", help="cpu: emulated kernels, a smoke test")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(words)


def facts(device: str) -> dict[str, Any]:
    found: dict[str, Any] = machine.facts("torch", "triton")
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["CUDA of torch"] = torch.version.cuda
    for name in ("cuda", "triton"):
        reason = why_unavailable(name)
        if reason is None:
            runs: Any = implementation(name)
            found[name] = runs.details()
    found["magic_fast"] = version("magic_fast") if _installed() else "in place"
    return found


def _installed() -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        return bool(version("magic_fast"))
    except PackageNotFoundError:
        return False


def main() -> None:
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device cuda: expected a GPU that torch sees, found none.")
    absent = {b: why_unavailable(b) for b in options.backends if why_unavailable(b)}
    options.backends = [b for b in options.backends if b not in absent]
    for name, reason in absent.items():
        print(f"backend {name}: {reason}", file=sys.stderr)
    if not options.backends:
        raise SystemExit("no backend to measure.")
    clock = Clock(options.device)
    bandwidth = copy_bandwidth(clock, 2 * options.size**2 * 4)
    about = facts(options.device)
    rows = measured(options, clock, bandwidth)

    def write() -> None:
        if options.json:
            report = {"facts": about, "copy": bandwidth, "rows": [asdict(r) for r in rows]}
            options.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
        if options.markdown:
            lines = [*table(rows, bandwidth), "", machine.line(about)]
            options.markdown.write_text("\n".join(lines) + "\n")

    write()
    if options.peers and any(r.work == COMPARED for r in rows):
        job = make_job((options.size,) * 2, 8, recipes(8)["ties"], 0, options.device)
        compare(rows, job, clock, write)
    print("\n".join([*table(rows, bandwidth), "", machine.line(about)]))


if __name__ == "__main__":
    main()

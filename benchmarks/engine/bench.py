"""Whole merges on disk, as processes, against a program that only reads the inputs and writes the
output's bytes.

    python benchmarks/engine/bench.py --set small=DIR --set 1b=DIR [--rounds N] [--peers PYTHON]
        [--json FILE] [--markdown FILE]
    python benchmarks/engine/bench.py --make .bench [--sizes small 1b]

A set is a folder that holds ``base`` and ``expert-0`` …; --make writes sets of 8 experts. Each
round runs every row once, so that what a shared machine does to one it does to all: `raw` (two
threads read all inputs, then the output's bytes are written and forced to the disk), then ours
(start-up and fsync included). The first round fills the page cache and is not counted. The aims:
task arithmetic + WSC in 1.5 × raw, TIES + WSC in 2.0 ×. PYTHON is the interpreter of an environment
with mergekit 0.1.5; without it those rows are printed as absent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402 - benchmarks/machine.py

# with compiled modules, as whatever is installed has them; the warm-up writes them
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
AIMS = {"task_arithmetic": 1.5, "ties": 2.0}
COUNTS = (2, 4, 8)
MIB = 1 << 20
#: Methods by what the rows are called: (merge_method, parameters).
METHODS = {
    "linear": ("linear", {"weight": 0.25}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3}),
    "ties": ("ties", {"weight": 0.5, "density": 0.2}),
}


@dataclass
class Row:
    """One thing that is timed.

    Attributes:
        models: base and experts read.
        bytes_in, bytes_out: sizes of the files, each once; a second read to find thresholds is
            not counted.
        raw: index of the row that the ratio is against; None for that row itself.
        seconds, peaks: one per counted round; peak anonymous memory in bytes.
    """

    set: str
    name: str
    experts: int
    bytes_in: int
    bytes_out: int
    command: list[str]
    raw: int | None = None
    method: str = ""
    once: bool = False
    absent: str = ""
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def weights(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def size(models: Sequence[Path]) -> int:
    return sum(path.stat().st_size for model in models for path in weights(model))


def run(command: Sequence[str], out: Path) -> tuple[float, int]:
    """Wall seconds and peak anonymous bytes of a process that makes ``out``, which is removed."""
    os.sync()  # what the last one left to write is not this one's
    peak, stopped = [0], threading.Event()
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, stopped))
    watcher.start()
    text, _ = process.communicate()
    seconds = time.perf_counter() - started
    stopped.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{text.decode()}")
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    return seconds, peak[0]


def _watch(process: int, peak: list[int], stopped: threading.Event) -> None:
    while not stopped.wait(0.01):
        try:
            text = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return
        for line in text.splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)


def build_raw(folder: Path) -> str:
    target = folder / "raw"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-O2", "-pthread", str(HERE / "raw.c"), "-o", str(target)], check=True
    )
    return str(target)


def config(folder: Path, models: Sequence[Path], row: str, *, calibrate: bool) -> Path:
    """A YAML that mergekit reads too, but for ``calibrate``."""
    method, parameters = METHODS[row]
    base, *experts = map(str, models)
    merged = [base, *experts] if method == "linear" else experts
    document: dict[str, object] = {"merge_method": method}
    if method != "linear":
        document["base_model"] = base
    document["models"] = [{"model": m, "parameters": parameters} for m in merged]
    document["dtype"] = "bfloat16"
    if calibrate:
        document["calibrate"] = "wsc"
    wsc, place = "-wsc" if calibrate else "", Path(base).parent.name
    path = folder / f"{place}-{row}-{len(experts)}{wsc}.yml"
    path.write_text(yaml.safe_dump(document))
    return path


class Plan:
    """The rows of a run, raw ones before what is compared with them."""

    def __init__(self, folder: Path, raw: str, peers: Path | None) -> None:
        self.folder, self.out, self.raw, self.peers = folder, folder / "out", raw, peers
        self.rows: list[Row] = []

    def add_set(self, name: str, models: Sequence[Path], *, peers: bool) -> None:
        raw = self._raw(name, models)
        for method in ("task_arithmetic", "ties"):
            self._ours(name, models, method, raw, calibrate=True)
        for method in ("linear", "ties"):
            if peers:
                self._ours(name, models, method, raw, calibrate=False)
                self._peer(name, models, method, raw)

    def add_counts(self, name: str, models: Sequence[Path]) -> None:
        """The same with K = 2, 4, 8."""
        for count in COUNTS:
            own = list(models[: 1 + count])
            if len(own) <= count:
                row = Row(name, f"K = {count}", count, 0, 0, [])
                row.absent = f"the set has {len(models) - 1} experts"
                self.rows.append(row)
                continue
            raw = self._raw(name, own)
            for method in ("task_arithmetic", "ties"):
                self._ours(name, own, method, raw, calibrate=True)

    def _raw(self, name: str, models: Sequence[Path]) -> int:
        files = [str(path) for model in models for path in weights(model)]
        bytes_out = size(models[:1])
        command = [self.raw, str(self.out), str(bytes_out), *files]
        self.rows.append(Row(name, "raw", len(models) - 1, size(models), bytes_out, command))
        return len(self.rows) - 1

    def _row(self, name: str, models: Sequence[Path], label: str, raw: int) -> Row:
        row = Row(name, label, len(models) - 1, size(models), size(models[:1]), [], raw)
        self.rows.append(row)
        return row

    def _ours(
        self, name: str, models: Sequence[Path], method: str, raw: int, *, calibrate: bool
    ) -> None:
        label = f"magic_fast, {method}{' + WSC' if calibrate else ''}"
        row = self._row(name, models, label, raw)
        row.method = method if calibrate else ""
        path = config(self.folder, models, method, calibrate=calibrate)
        row.command = [
            sys.executable, "-m", "magic_fast", "merge", str(path), str(self.out), "--quiet",
        ]  # fmt: skip

    def _peer(self, name: str, models: Sequence[Path], method: str, raw: int) -> None:
        row = self._row(name, models, f"mergekit, {method}", raw)
        if self.peers is None:
            row.absent = "no --peers given"
            return
        tool = self.peers.parent / "mergekit-yaml"
        if not tool.exists():
            row.absent = f"no {tool}"
            return
        path = config(self.folder, models, method, calibrate=False)
        row.command = [str(tool), str(path), str(self.out)]
        row.once = True

    def measure(self, rounds: int) -> None:
        for round_ in range(rounds + 1):
            for row in self.rows:
                warm_up = round_ == 0 and not row.once
                if row.absent or (row.once and round_ != 1):
                    continue
                seconds, peak = run(row.command, self.out)
                if not warm_up:
                    row.seconds.append(seconds)
                    row.peaks.append(peak)
            print(f"round {round_} of {rounds} done", file=sys.stderr)


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = [
        "| set | row | K | GB moved | median s | GB/s | × raw | aim | peak anonymous MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        moved = (row.bytes_in + row.bytes_out) / 1e9
        if row.absent or row.median is None:
            why = f"absent: {row.absent}"
            lines.append(f"| {row.set} | {row.name} | {row.experts} | | {why} | | | | |")
            continue
        raw = None if row.raw is None else rows[row.raw].median
        ratio = f"{row.median / raw:.2f}" if raw else "1"
        aim = f"{AIMS[row.method]}" if row.method in AIMS else ""
        lines.append(
            f"| {row.set} | {row.name} | {row.experts} | {moved:.2f} | {row.median:.3f} | "
            f"{moved / row.median:.2f} | {ratio} | {aim} | {max(row.peaks) / MIB:.0f} |"
        )
    return lines


def speedups(rows: Sequence[Row]) -> list[str]:
    """How many times faster than the peer on the same YAML, and the share of its memory."""
    lines = []
    for row in rows:
        if not row.name.startswith("mergekit") or row.median is None:
            continue
        label = row.name.replace("mergekit", "magic_fast")
        own = next(r for r in rows if r.set == row.set and r.name == label)
        if own.median is not None:
            share = max(own.peaks) / max(row.peaks)
            lines.append(
                f"{row.set}: {label.split(', ')[1]} {row.median / own.median:.1f} times as fast "
                f"as mergekit, at {share:.2f} of its peak anonymous memory."
            )
    return lines


def spread(rows: Sequence[Row]) -> list[str]:
    """Least and most seconds of the raw rows: what the machine itself did."""
    return [
        f"{r.set}, K = {r.experts}: raw took {min(r.seconds):.3f} to {max(r.seconds):.3f} s."
        for r in rows
        if r.name == "raw" and r.seconds
    ]


@contextmanager
def work_folder(parent: Path | None) -> Iterator[Path]:
    """A folder for outputs, on the file system that is to be measured."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        yield Path(folder)


def make_sets(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    from magic_fast.cli.demo_data import SIZES, LlamaShape, write_checkpoints

    sizes = SIZES | {"1b": LlamaShape(2048, 22, 5632, 32000, 32, 4, 10**9)}
    for name in names:
        write_checkpoints(folder / name, sizes[name], num_experts=3 if name == "1b" else 8)
    return {name: folder / name for name in names}


def write_headers(folder: Path, tensors: int, shards: int = 12) -> None:
    """A model of ``tensors`` small tensors whose data are holes in its files."""
    folder.mkdir()
    names = [f"model.layers.{i // 600}.mlp.experts.{i % 600}.up.weight" for i in range(tensors)]
    weight_map = {}
    for shard in range(shards):
        mine = names[shard::shards]
        entries = {
            name: {"dtype": "BF16", "shape": [16, 8], "data_offsets": [256 * n, 256 * (n + 1)]}
            for n, name in enumerate(mine)
        }
        raw = json.dumps(entries).encode()
        path = folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        with open(path, "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + 256 * len(mine))
        weight_map |= dict.fromkeys(mine, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def plan_lines(folder: Path, models: int = 5) -> list[str]:
    """How long plans of many tensors take, from open to every tensor's place and way, in a process
    of its own (whose imports are not counted)."""
    program = (
        "import sys, time, magic_fast as mf, magic_fast.config\n"
        "mf.plan_checkpoints\n"
        "wall, own = time.perf_counter(), time.process_time()\n"
        "plan = mf.plan_checkpoints(sys.argv[1], sys.argv[2])\n"
        "assert plan.budget.fits\n"
        "print(time.perf_counter() - wall, time.process_time() - own)"
    )
    lines = []
    for tensors in (9000, 18_000, 36_000):
        place = folder / f"headers-{tensors}"
        place.mkdir()
        for number in range(models):
            write_headers(place / str(number), tensors)
        path = config(folder, [place / str(n) for n in range(models)], "ties", calibrate=True)
        command = [sys.executable, "-c", program, str(path), str(folder / "none")]
        found = []
        for _ in range(3):
            text = subprocess.run(
                command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True
            )
            found.append([float(word) for word in text.stdout.split()])
        wall, own = min(found)
        lines.append(
            f"planning {tensors} tensors of {models} models: {wall:.2f} s ({own:.2f} s of CPU; "
            "aim at 36000: 2), best of 3."
        )
    return lines


def _pair(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got {text!r}")
    return name, folder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", type=_pair, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--make", type=Path, metavar="DIR", help="make the sets there, once")
    parser.add_argument("--sizes", nargs="+", default=["small"], choices=["tiny", "small", "1b"])
    parser.add_argument("--experts", type=int, default=3, help="K of the main rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", default="small", help="set that also runs with K = 2, 4, 8")
    parser.add_argument("--peers", type=Path, help="Python of an environment with mergekit")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    parser.add_argument("--plan", action="store_true", help="time the planning of many tensors")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    sets = {name: Path(folder) for name, folder in options.set}
    if options.make is not None:
        sets |= make_sets(options.make, [s for s in options.sizes if s not in sets])
    if options.plan:
        with work_folder(options.work) as folder:
            print("\n".join(plan_lines(folder)))
    if not sets and not options.plan:
        raise SystemExit("no set of checkpoints: expected --set NAME=DIR or --make DIR.")
    if not sets:
        return
    with work_folder(options.work) as folder:
        plan = Plan(folder, build_raw(folder), options.peers)
        for name, place in sets.items():
            found = [place / "base", *sorted(place.glob("expert-*"))]
            plan.add_set(name, found[: 1 + options.experts], peers=True)
            if name == options.counts:
                plan.add_counts(name, found)
        plan.measure(options.rounds)
    lines = [*table(plan.rows), "", *speedups(plan.rows), "", *spread(plan.rows)]
    facts = machine.facts("xxhash", "pydantic")
    lines += [f"Medians of {options.rounds} interleaved rounds. {machine.line(facts)}"]
    print("\n".join(lines))
    if options.json:
        report = [
            {k: v for k, v in asdict(row).items() if k != "command"} | {"median": row.median}
            for row in plan.rows
        ]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""TIES, DELLA or PCB, with WSC, here against the tools in use, one tensor, interleaved in one run.

    python benchmarks/cpu/against.py [--method ties|della|pcb] [--peers PYTHON] [--rows N]
    [--cols N] [--experts K] [--rounds N] [--warmup N] [--json FILE] [--markdown FILE]

PYTHON is the interpreter of an environment that has mergekit 0.1.5 and PEFT; `make peers` makes
one. Without it their rows are printed as absent. They merge without WSC; ours does both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench import data, recipes

from magic_fast import _native
from magic_fast.methods.presets import build_recipe
from magic_fast.ops.job import Job
from magic_fast.ops.native.backend import NativeBackend
from magic_fast.ops.torch.backend import TorchBackend
from magic_fast.recipe import EpsMode, RowCalibration

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402 - benchmarks/machine.py

# which peers have the method
TOOLS: dict[str, tuple[str, ...]] = {
    "ties": ("mergekit", "peft"),
    "della": ("mergekit",),
    "pcb": (),
}


@dataclass
class Row:
    name: str
    run: Callable[[], float | None]
    seconds: list[float] = field(default_factory=list)
    absent: str = ""


class Peer:
    """The process of the other environment."""

    def __init__(self, python: str, *sizes: int) -> None:
        command = [python, str(HERE / "peer.py"), *map(str, sizes)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def time(self, tool: str) -> float | str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(tool + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        return answer if answer.startswith("absent") else float(answer)


def timed(function: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=sorted(TOOLS), default="ties")
    parser.add_argument("--peers", help="Python of an environment with mergekit and PEFT")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before that do not count")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    k, threads = options.experts, _native.num_threads()
    torch.set_num_threads(threads)
    base, experts = data(k, options.rows, options.cols)
    out = torch.zeros_like(base)
    calibration = RowCalibration(options.rows, options.cols)
    method, title = options.method, options.method.upper()
    scored = {"ratio": 0.1, "scope": "tensor", "scale": 1.2}  # no GPU kernel has it
    recipe = build_recipe("pcb", k, scored) if method == "pcb" else recipes(k)[method]
    job = Job(base, experts, recipe, out, calibration=calibration)
    authors = RowCalibration(options.rows, options.cols, eps_mode=EpsMode.ABSOLUTE, clamp=None)
    eager = Job(base, experts, recipe, torch.zeros_like(base), calibration=authors, details=True)
    merged, cut = torch.zeros_like(base), torch.zeros_like(base)
    native = NativeBackend()
    native.merge(Job(base, experts, recipe, merged))
    alone = Job(base, experts, recipe, cut, calibration=calibration)
    rows = [
        Row(f"magic_fast native, {title} + WSC", timed(lambda: NativeBackend().merge(job))),
        Row("the same formulas in eager torch", timed(lambda: TorchBackend().merge(eager))),
    ]
    peer = Peer(options.peers, k, options.rows, options.cols, threads) if options.peers else None
    for tool in TOOLS[method]:
        row = Row(
            f"{tool}, {title}, no WSC", lambda: None, absent="" if peer else "no --peers given"
        )
        if peer is not None:
            asked = f"{tool} {method}"
            row.run = lambda asked=asked, row=row: _ask(peer, asked, row)
        rows.append(row)
    rows += [
        Row("WSC alone, native", timed(lambda: native.calibrate(alone, merged))),
        Row("WSC alone, formula in torch", timed(lambda: TorchBackend().calibrate(alone, merged))),
    ]
    for round_ in range(options.warmup + options.rounds):
        for row in rows:
            time.sleep(0.5)  # torch's threads go on spinning for a while after their work
            seconds = None if row.absent else row.run()
            if seconds is not None and round_ >= options.warmup:
                row.seconds.append(seconds)
    facts = machine.facts("torch") | {"isa": _native.isa(), "threads": str(threads)}
    lines = [
        f"{options.rows} x {options.cols} bf16, K = {k}; medians of {options.rounds} round(s).",
        "",
    ]
    lines += ["| work | seconds | times ours |", "|---|--:|--:|"]
    report = []
    ours = 0.0
    for row in rows:
        median = statistics.median(row.seconds) if row.seconds else None
        if "native" in row.name and median:
            ours = median  # the rows that follow do the same work
        shown = f"{median:.3f} | {median / ours:.1f}" if median else f"absent: {row.absent} |"
        lines.append(f"| {row.name} | {shown} |")
        report.append({"name": row.name, "seconds": median, "absent": row.absent})
    print(machine.line(facts), *lines, sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": report}, indent=1) + "\n")
    if options.markdown:
        head = [f"# {title} + WSC against the tools in use", "", machine.line(facts), ""]
        options.markdown.write_text("\n".join([*head, *lines]) + "\n")


def _ask(peer: Peer, tool: str, row: Row) -> float | None:
    answer = peer.time(tool)
    if isinstance(answer, str):
        row.absent = answer
        return None
    return answer


if __name__ == "__main__":
    main()

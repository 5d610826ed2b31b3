"""`make gpu`: builds, tests, checks and measures the fused backends on the GPU of this machine.

    python benchmarks/gpu/run.py [--results DIR] [--limit SECONDS] [--skip STEP ...]

Needs a GPU, nvcc, and a Python with torch, triton, numpy, pybind11, setuptools and pytest; no
network, and any of their versions. Nothing is installed: the package is laid out in build/gpu/site.
The recorded outputs of other systems come from the folder that MAGIC_FAST_GOLDEN names. A step that
fails or runs out of time does not stop the others: DIR/gpu.json and DIR/gpu.md hold what each did,
build/gpu the logs; the exit code is 1 if a step failed, 3 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOGS = ROOT / "build" / "gpu"
SITE = LOGS / "site"
TOOLS = ("memcheck", "racecheck", "initcheck")
PASSED, FAILED, ABSENT = "passed", "failed", "not run"


@dataclass
class Step:
    """What one step did."""

    name: str
    state: str
    seconds: float
    words: str = ""


@dataclass(frozen=True)
class Command:
    """A process of a step."""

    words: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def start(command: Command) -> subprocess.Popen[bytes]:
    paths = [str(SITE), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["PYTHONUNBUFFERED"] = "1"
    for name in ("TRITON_INTERPRET", "MAGIC_FAST_CUDA_EMULATED"):  # the device, not its stand-ins
        environment.pop(name, None)
    with open(command.log, "wb") as log:
        return subprocess.Popen(
            list(command.words), cwd=ROOT, env=environment | dict(command.environment),
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """The exit code; None where the process was ended at the deadline, its children with it."""
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def tail(log: Path, lines: int = 1) -> str:
    """The last words of a log, for a cell of a table."""
    found = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
    return " / ".join(found[-lines:])[-200:].replace("|", "/")


def lay_out(site: Path = SITE) -> None:
    """The package as an installation has it, of links: kernels/ and examples/ lie inside."""
    shutil.rmtree(site, ignore_errors=True)
    package = site / "magic_fast"
    package.mkdir(parents=True)
    for path in (*(ROOT / "magic_fast").iterdir(), ROOT / "kernels", ROOT / "examples"):
        if path.name != "__pycache__" and not (package / path.name).is_symlink():
            (package / path.name).symlink_to(path)


class Run:
    """The steps, in order. ``logs`` takes one log a process."""

    def __init__(self, python: str, logs: Path, end: float) -> None:
        self.python, self.logs, self.end = python, logs, end
        self.steps: list[Step] = []
        logs.mkdir(parents=True, exist_ok=True)

    def step(self, name: str, most: float, work: Callable[[float], tuple[str, str]]) -> None:
        """One step within ``most`` seconds and what is left of the whole."""
        began = time.monotonic()
        deadline = min(began + most, self.end)
        if deadline <= began + 1:
            state, words = ABSENT, "no time left"
        else:
            try:
                state, words = work(deadline)
            except OSError as error:
                state, words = FAILED, str(error)
        self.steps.append(Step(name, state, time.monotonic() - began, words))
        print(f"{name}: {state} in {self.steps[-1].seconds:.0f} s. {words}", flush=True)

    def command(self, name: str, words: Sequence[str], **environment: str) -> Command:
        return Command(words, self.logs / f"{name}.log", environment)

    def one(self, command: Command, deadline: float) -> tuple[str, str]:
        code = finish(start(command), deadline)
        if code is None:
            return FAILED, f"ran out of time: {tail(command.log)}"
        return (PASSED if code == 0 else FAILED), tail(command.log)

    # ---- the steps ----
    def build(self, deadline: float) -> tuple[str, str]:
        if shutil.which("nvcc") is None:
            lay_out()
            return ABSENT, "no nvcc on the PATH: the cuda backend is missing below"
        settings = {"MAGIC_FAST_CUDA": "1", "MAGIC_FAST_REQUIRE_NATIVE": "1"}
        if platform.machine() == "x86_64":  # the CPU's part is not what is tried here
            settings["MAGIC_FAST_ISAS"] = "baseline,avx2"
        words = [self.python, "setup.py", "build_ext", "--inplace", "--parallel", "8"]
        command = self.command("build", words, **settings)
        state, last = self.one(command, deadline)
        lay_out()
        return state, "" if state == PASSED else last

    def tests(self, name: str, chosen: str, deadline: float) -> tuple[str, str]:
        # the options of pyproject.toml name plugins that may not be here
        workers = self.workers()
        words = [self.python, "-m", "pytest", "-o", "addopts=", "-q", "-rs"]
        words += ["--import-mode=importlib", "-p", "no:cacheprovider"]
        words += ["-m", "gpu", "-k", chosen, "tests/gpu", *workers]
        # the package as it is laid out, not the one beside this file
        # one thread of LAPACK a worker: the oracle's 14 times 16 take minutes for seconds
        threads = "1" if workers else str(len(os.sched_getaffinity(0)))
        command = self.command(name, words, PYTHONSAFEPATH="1", OMP_NUM_THREADS=threads)
        state, last = self.one(command, deadline)
        return (FAILED if state == PASSED and "passed" not in last else state), last

    def workers(self) -> list[str]:
        """Several processes where pytest-xdist is: most of the time is compiling and the oracle."""
        has = subprocess.run([self.python, "-c", "import xdist"], capture_output=True).returncode
        count = min(12, len(os.sched_getaffinity(0)) - 2)
        return ["-n", str(count)] if has == 0 and count > 1 else []

    def sanitizer(self, deadline: float) -> tuple[str, str]:
        """The three tools beside each other: they are slow on the host, not on the device."""
        if (program := shutil.which("compute-sanitizer")) is None:
            return ABSENT, "no compute-sanitizer on the PATH"
        running = []
        for tool in TOOLS:
            words = [program, "--tool", tool, "--error-exitcode", "9", self.python]
            # each tensor an allocation of its own, so that a step over its end is seen
            command = self.command(
                tool, [*words, "benchmarks/gpu/short.py"], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
            )
            running.append((tool, command, start(command)))
        found = []
        for tool, command, process in running:
            code = finish(process, deadline)
            found.append((tool, code, summary(command.log)))
        state = PASSED if all(code == 0 for _, code, _ in found) else FAILED
        told = {0: "clean", None: "out of time"}
        return state, "; ".join(f"{t}: {told.get(c, f'exit {c}, {w}')}" for t, c, w in found)

    def bench(self, deadline: float) -> tuple[str, str]:
        files = ["--json", str(self.logs / "bench.json"), "--markdown", str(self.logs / "bench.md")]
        command = self.command("bench", [self.python, "benchmarks/gpu/bench.py", *files])
        state, last = self.one(command, deadline)
        return state, "" if state == PASSED else last

    def spectral(self, deadline: float) -> tuple[str, str]:
        """Against SVD, which takes most of the time: one round, the cheap rows first."""
        words = [self.python, "benchmarks/spectral/bench.py", "--device", "cuda", "--rounds", "1"]
        words += ["--shapes", "768x3072", "4096x4096"]
        words += ["--json", str(self.logs / "spectral.json")]
        words += ["--markdown", str(self.logs / "spectral.md")]
        command = self.command("spectral", words)
        state, last = self.one(command, deadline)
        return state, "" if state == PASSED else last

    def figures(self, name: str) -> tuple[Any, str]:
        """JSON and Markdown of a benchmark; None and words where it did not end."""
        found = self.logs / f"{name}.json", self.logs / f"{name}.md"
        if not all(f.exists() for f in found):
            return None, f"No figures: the benchmark ({name}) did not end."
        return json.loads(found[0].read_text()), found[1].read_text().strip()


def summary(log: Path) -> str:
    """What a sanitizer says at its end."""
    found = re.findall(r"=+ (ERROR SUMMARY.*|RACECHECK SUMMARY.*)", log.read_text(errors="replace"))
    return found[-1] if found else tail(log)


def why_no_gpu(python: str) -> str | None:
    """Why nothing can run here, in one line; None if it can."""
    ask = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)"
    ended = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    if ended.returncode == 3:
        return "no GPU is visible to torch here"
    if ended.returncode:
        words = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        return f"{python} cannot import torch here: {words}"
    return None


def facts() -> dict[str, str]:
    """Device, driver and compiler in the words of their tools."""
    found = {}
    for name, words in {
        "GPU and driver": [
            "nvidia-smi",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
        ],
        "nvcc": ["nvcc", "--version"],
    }.items():
        if shutil.which(words[0]):
            said = subprocess.run(words, capture_output=True, text=True).stdout.strip()
            found[name] = said.splitlines()[-1] if said else "silent"
    return found


def document(result: Mapping[str, Any], tables: str) -> str:
    """The Markdown of a result: what each step did, the tables of the benchmark below."""
    about = "; ".join(f"{k}: {v}" for k, v in result["facts"].items())
    lines = ["# The fused backends on a GPU", "", f"`{result['command']}`", "", about, ""]
    lines += ["| step | result | s | |", "|---|---|--:|---|"]
    lines += [
        f"| {s['name']} | {s['state']} | {s['seconds']:.0f} | {s['words']} |"
        for s in result["steps"]
    ]
    return "\n".join([*lines, "", tables]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all steps together")
    steps = ("build", "tests", "bench", "spectral", "sanitizer", "triton")
    parser.add_argument("--skip", nargs="+", default=[], choices=steps)
    options = parser.parse_args(arguments)
    reason = why_no_gpu(sys.executable)
    if reason is not None:
        print(f"make gpu: {reason}. Nothing was run.", file=sys.stderr)
        return 3
    options.results.mkdir(parents=True, exist_ok=True)
    run = Run(sys.executable, LOGS, time.monotonic() + options.limit)
    benches = ("bench", "spectral")
    for old in benches:
        for ending in ("json", "md"):
            (LOGS / f"{old}.{ending}").unlink(missing_ok=True)
    if "build" in options.skip:
        lay_out()
    # A step that takes all its time leaves the later ones theirs. Triton's tests come last, as what
    # they take is compiling: they have whatever the others left.
    plan: dict[str, tuple[float, Callable[[float], tuple[str, str]]]] = {
        "build": (200, run.build),
        "tests": (120, partial(run.tests, "tests", "not triton")),
        "bench": (130, run.bench),
        "sanitizer": (60, run.sanitizer),
        "spectral": (130, run.spectral),
        "triton": (options.limit, partial(run.tests, "triton", "triton")),
    }
    for name, (most, work) in plan.items():
        if name not in options.skip:
            run.step(name, most, work)
    figures = {name: run.figures(name) for name in benches}
    tables = "\n\n".join(
        ["## One merge", figures["bench"][1], "## Spectral methods", figures["spectral"][1]]
    )
    result = {
        "command": " ".join(["make gpu", *(sys.argv[1:] if arguments is None else arguments)]),
        "facts": facts(),
        "steps": [asdict(s) for s in run.steps],
        **{name: found for name, (found, _) in figures.items()},
    }
    (options.results / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.results / "gpu.md").write_text(document(result, tables))
    failed = [s.name for s in run.steps if s.state == FAILED]
    print(f"{options.results / 'gpu.md'}: written. Logs are in {LOGS}.")
    if failed:
        print(f"make gpu: failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

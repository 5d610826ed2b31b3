"""A merge on a slow disk, killed at random instants and resumed: a program of its own.

    python slow_files.py CONFIG FOLDER TRIALS SEED

Every attempt is a child process, forked before any thread exists. Prints one line of JSON per
trial: how far the killed attempt was, what resuming wrote, and the hash of every file.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from engine.hashing import hashes
from magic_fast.api.checkpoints.merge import merge_checkpoints
from magic_fast.checkpoint import FileSystem

MEMORY = 4 << 20
SECONDS = {"pwrite": 0.002, "fsync": 0.004, "rename": 0.02, "truncate": 0.004}


def slow_down() -> None:
    """Every write takes its time, in this process."""
    for name, seconds in SECONDS.items():
        real = getattr(FileSystem, name)

        def slow(self: FileSystem, *arguments: Any, _real: Any = real, _s: float = seconds) -> Any:
            time.sleep(_s / 2)
            result = _real(self, *arguments)
            time.sleep(_s / 2)
            return result

        setattr(FileSystem, name, slow)


def attempt(config: str, out: Path, *, slow: bool, resume: bool) -> int:
    """A child that merges; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        if slow:
            slow_down()
        report = merge_checkpoints(
            config, out, resume=resume, memory=MEMORY, max_shard_size=150_000
        )
        (out.parent / "written").write_text(str(report.bytes_written))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(config: str, out: Path, **options: Any) -> None:
    _, status = os.waitpid(attempt(config, out, **options), 0)
    if status:
        raise SystemExit(f"an attempt ended with status {status}")


def kill_after(child: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def progress_of(out: Path) -> str:
    """How far a killed attempt was: nothing, begun, a number of pieces, sealing, or finished."""
    partial = out.parent / f".{out.name}.partial"
    if out.exists():
        return "finished"
    if not partial.exists():
        return "nothing"
    journal = partial / "journal.jsonl"
    if not journal.exists():
        return "sealing" if (partial / "magic_fast.json").exists() else "begun"
    return str(max(journal.read_bytes().count(b"\n") - 1, 0))


def main(config: str, folder: Path, trials: int, seed: int) -> None:
    durations = []
    for name in ("first", "whole"):
        started = time.monotonic()
        finish(config, folder / name / "out", slow=True, resume=False)
        durations.append(time.monotonic() - started)
    duration, draw = min(durations), random.Random(seed)
    assert hashes(folder / "first" / "out") == hashes(folder / "whole" / "out")
    print(json.dumps({"hashes": hashes(folder / "whole" / "out"), "seconds": duration}))
    for trial in range(trials):
        out = folder / str(trial) / "out"
        out.parent.mkdir()
        states = []
        for _ in range(1 + trial % 2):  # every other one is killed while it resumes, too
            child = attempt(config, out, slow=True, resume=True)
            kill_after(child, draw.uniform(0, duration))
            states.append(progress_of(out))
        finish(config, out, slow=False, resume=True)
        written = int((out.parent / "written").read_text())
        line = {"states": states, "written": written, "hashes": hashes(out)}
        left = sorted(p.name for p in out.parent.iterdir())
        print(json.dumps(line | {"left": left}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

"""Ctrl-C and SIGTERM: the run stops by itself, says so, and can be resumed to the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, Models, environment
from engine.hashing import hashes
from magic_fast.checkpoint.staging import Staging
from magic_fast.cli import main
from support.backends import available_backends

PROGRAM = Path(__file__).with_name("interrupted_merge.py")
SHAPES = {"a.weight": (101, 701), "b.weight": (64, 48), "c.bias": (150_001,), "d": ()}
native = pytest.mark.skipif(
    "native" not in available_backends(), reason="pieces need the native backend"
)


class Job:
    def __init__(self, folder: Path) -> None:
        models = Models(folder / "m", SHAPES, ((torch.float32,),) * 4)
        self.config = folder / "config.yml"
        self.config.write_text(models.config("ties", parameters={"density": 0.3, "weight": 0.7}))
        mf.merge_checkpoints(self.config, folder / "whole" / "out", memory=4 * MIB)
        self.whole = hashes(folder / "whole" / "out")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@contextmanager
def started(job: Job, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(PROGRAM), *options, "merge", str(job.config), str(out)]
    command += ["--memory", "4MiB", "--progress", "json"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("lines", [1, 3, 5])
@native
def test_a_signal_stops_the_run(job: Job, number: int, lines: int, tmp_path: Path) -> None:
    """When so many lines of progress have been printed."""
    out = tmp_path / "out"
    with started(job, out) as process:
        assert process.stderr is not None
        told = [process.stderr.readline() for _ in range(lines)]
        assert all(line.startswith("{") for line in told), told
        process.send_signal(number)
        process.send_signal(number)  # a second one changes nothing
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == (
        f"magic-fast: interrupted; {out} was not made. The same command with --resume continues"
    )
    assert "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", ".out.partial.lock"]
    report = mf.merge_checkpoints(job.config, out, resume=True, memory=4 * MIB)
    if lines == 5:  # what was merged four units ago is written
        assert report.bytes_written < sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert hashes(out) == job.whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@native
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_nobody_heeds(job: Job, number: int, tmp_path: Path) -> None:
    """Inside a long calculation the process ends as if it had been killed."""
    out = tmp_path / "out"
    with started(job, out, "--stuck") as process:
        assert process.stderr is not None and process.stderr.readline() == "stuck\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=50)
    assert process.returncode == 130
    assert error == "magic-fast: interrupted; the same command with --resume continues\n"
    mf.merge_checkpoints(job.config, out, resume=True, memory=4 * MIB)
    assert hashes(out) == job.whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert main(["verify", str(tmp_path), "-q"]) == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


class PowerCut(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_killed_right_after_the_last_rename(
    name: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock file stays behind, and nothing else; the next run puts it away."""
    from magic_fast.checkpoint.fs import FileSystem

    out, real = tmp_path / name, FileSystem.rename

    def rename(own: FileSystem, source: str, target: str) -> None:
        real(own, source, target)
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(FileSystem, "rename", rename)
        patch.setattr(Staging, "abandon", lambda own, keep: own._lock._fs.close(own._lock._fd))
        mf.merge_checkpoints(job.config, out)
    left = sorted(p.name for p in tmp_path.iterdir())
    single = [f".{name}.partial"] if name != "out" else []
    assert left == [*single, f".{name}.partial.lock", name]
    before = hashes(out) if out.is_dir() else out.read_bytes()
    if name == "out":
        assert before == job.whole
    assert main(["merge", str(job.config), str(out), "-q"]) == 2, "it is in the way, as ever"
    assert main(["merge", str(job.config), str(out), "--resume", "-q"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]
    assert (hashes(out) if out.is_dir() else out.read_bytes()) == before

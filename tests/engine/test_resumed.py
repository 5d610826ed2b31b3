"""What a resumed run takes over, what it does again, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, Models, environment
from engine.hashing import hashes, stamps
from magic_fast.checkpoint import OutputFolder
from magic_fast.engine.output import journal
from support.backends import available_backends

SHAPES = {"a.weight": (101, 701), "b.weight": (64, 48), "c.bias": (150_001,), "d": ()}
OPTIONS: dict[str, Any] = {"memory": 4 * MIB, "max_shard_size": 400_000}
native = pytest.mark.skipif(
    "native" not in available_backends(), reason="pieces need the native backend"
)


class PowerCut(BaseException):
    """Stands for a kill: nothing of ours catches it."""


class Job:
    """A merge that can be interrupted when half of it is written."""

    def __init__(self, folder: Path) -> None:
        self.models = Models(folder / "m", SHAPES, ((torch.float32,),) * 4)
        self.config = self.models.config(
            "ties", parameters={"density": 0.3, "weight": 0.7}, calibrate="wsc"
        )
        mf.merge_checkpoints(self.config, folder / "whole" / "out", **OPTIONS)
        self.whole = hashes(folder / "whole" / "out")
        self.out = folder / "out"
        self.partial = folder / ".out.partial"
        self.journal = self.partial / "journal.jsonl"

    def interrupt(self, monkeypatch: pytest.MonkeyPatch, after: int = 4, **options: Any) -> None:
        real, calls = journal.Journal.add, []

        def add(own: journal.Journal, record: journal.Record) -> None:
            calls.append(record)
            if len(calls) > after:
                raise PowerCut
            real(own, record)

        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(journal.Journal, "add", add)
            mf.merge_checkpoints(self.config, self.out, **{**OPTIONS, **options})
        assert not self.out.exists() and self.journal.exists()

    def resume(self, **options: Any) -> mf.MergeReport:
        return mf.merge_checkpoints(self.config, self.out, resume=True, **{**OPTIONS, **options})

    def check(self, report: mf.MergeReport, written: range) -> None:
        assert hashes(self.out) == self.whole
        assert report.bytes_written in written
        assert not self.partial.exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def job(prepared: Job, tmp_path: Path) -> Iterator[Job]:
    prepared.out, prepared.partial = tmp_path / "out", tmp_path / ".out.partial"
    prepared.journal = prepared.partial / "journal.jsonl"
    before = hashes(prepared.models.folder), stamps(prepared.models.folder)
    yield prepared
    assert (hashes(prepared.models.folder), stamps(prepared.models.folder)) == before


ALL = (101 * 701 + 64 * 48 + 150_001 + 1) * 4


@native
def test_what_was_written_is_taken_over(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.interrupt(monkeypatch)
    job.check(job.resume(), range(1, ALL // 2))


def test_nothing_to_resume_starts_afresh(job: Job) -> None:
    job.check(job.resume(), range(ALL, ALL + 1))


def test_a_finished_output_is_verified(job: Job) -> None:
    job.resume()
    before = stamps(job.out)
    assert job.resume().bytes_written == 0
    assert stamps(job.out) == before


@native
@pytest.mark.parametrize("memory", [9 * MIB, 128 * MIB])
def test_other_blocks_of_memory(job: Job, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that were written whole are taken over, in their own pieces; the others are done
    again."""
    job.interrupt(monkeypatch)
    job.check(job.resume(memory=memory), range(1, ALL))


@native
def test_smaller_blocks_that_must_hold_a_row(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.interrupt(monkeypatch, memory=64 * MIB, after=1)
    job.interrupt(monkeypatch, memory=5 * MIB, after=1, resume=True)
    job.check(job.resume(memory=1), range(1, ALL + 1))


@native
@pytest.mark.parametrize("every", [False, True])
def test_damaged_bytes_are_done_again(
    job: Job, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.interrupt(monkeypatch, after=5)
    lines = [json.loads(line) for line in job.journal.read_text().splitlines()[1:]]
    bad = lines if every else lines[2:3]
    with OutputFolder(job.out, resume=True, resumable=True) as output:
        plan = mf.plan_checkpoints(job.config, job.out, **OPTIONS)
        output.create_shards(plan.shards)
        for record in bad:
            byte = bytearray(1)
            output.read_into(record["name"], byte, record["start"] * 4 + 2)
            output.write(record["name"], bytes([byte[0] ^ 1]), record["start"] * 4 + 2)
    report = job.resume()
    job.check(report, range(1, ALL + 1))
    assert (report.bytes_written == ALL) is every


@native
@pytest.mark.parametrize("garbage", [b'{"name": "c.b', b"\x00" * 40, b"[1]\n", b"null\n7\n"])
def test_torn_journal(job: Job, garbage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    job.interrupt(monkeypatch)
    with open(job.journal, "ab") as file:
        file.write(garbage)
    job.check(job.resume(), range(1, ALL // 2))


@pytest.mark.parametrize("left", [0, 1, 40])
def test_a_journal_without_a_head(job: Job, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job.interrupt(monkeypatch, after=2)
    os.truncate(job.journal, left)
    job.check(job.resume(), range(ALL, ALL + 1))


def test_the_journal_of_a_head_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.interrupt(monkeypatch, after=2)
    head = job.journal.read_bytes().split(b"\n")[0]
    job.journal.write_bytes(head)
    job.check(job.resume(), range(ALL, ALL + 1))


@native
def test_without_resume_what_lies_there_is_ignored(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.interrupt(monkeypatch)
    (job.partial / "stale.json").write_text("{}")
    report = mf.merge_checkpoints(job.config, job.out, **OPTIONS)
    job.check(report, range(ALL, ALL + 1))


@native
def test_files_of_an_earlier_attempt_do_not_come_along(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.interrupt(monkeypatch)
    (job.partial / "stale.json").write_text("{}")
    (job.partial / "model-00009-of-00009.safetensors").write_bytes(b"x")
    job.check(job.resume(), range(1, ALL // 2))


def refusal(job: Job, **options: Any) -> str:
    kept = hashes(job.partial)
    config = options.pop("config", job.config)
    with pytest.raises(mf.InputError) as caught:
        mf.merge_checkpoints(config, job.out, resume=True, **{**OPTIONS, **options})
    assert hashes(job.partial) == kept, "a refusal leaves everything as it was"
    assert not job.out.exists()
    message = str(caught.value)
    assert message.endswith("Run without --resume to start afresh.")
    return message


@native
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"backend": "torch"}, "got another: the backend: was native, is torch."),
        (
            {"max_shard_size": 1},
            "got another: the layout of the output (names, dtypes, shapes, shard size).",
        ),
        ({"calibrate": mf.WeightCalibration(strength=0.5)}, "calibrate: strength was 1.0, is 0.5."),
        ({"seed": 5}, "got another: seed: was 0, is 5."),
        ({"compat": "mergekit-0.1.4"}, "got another: compat: was none, is mergekit-0.1.4."),
        ({"nonfinite": "propagate"}, "nonfinite: was error, is propagate."),
    ],
    ids=lambda value: str(value)[:24],
)
def test_another_run_is_refused(
    job: Job, options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.interrupt(monkeypatch)
    assert expected in refusal(job, **options)
    job.check(job.resume(), range(1, ALL // 2))


@native
def test_another_configuration_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.interrupt(monkeypatch)
    other = job.config.replace("density: 0.3", "density: 0.4")
    assert "got another: the configuration." in refusal(job, config=other)


@native
def test_another_device_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.interrupt(monkeypatch)
    lines = job.journal.read_text().split("\n")
    head = json.loads(lines[0])
    head["identity"]["device"] = "cuda"
    job.journal.write_text("\n".join([json.dumps(head), *lines[1:]]))
    assert "the device: was cuda, is cpu" in refusal(job)


@pytest.mark.parametrize("change", ["time", "size", "header"])
def test_another_input_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)
    job.interrupt(monkeypatch, after=1)
    path = job.models.folder / "expert-1" / "model.safetensors"
    status, data = path.stat(), path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length]
    if change == "time":
        expected = "it was written to since (modification time changed)"
    elif change == "size":
        head += b" " * 8
        expected = f"size was {status.st_size} bytes, is {status.st_size + 8} bytes"
    else:  # the same tensors, in other words
        entries = reversed(json.loads(head).items())
        head = json.dumps(dict(entries), separators=(",", ":")).encode().ljust(length)
        expected = "its header changed"
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert f"got another: {path}: {expected}" in refusal(job)


# Holds an output until its standard input closes.
HOLD = """
import sys
from magic_fast.checkpoint import OutputFolder
with OutputFolder(sys.argv[1], resumable=True):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_into_the_same_output(job: Job, resume: bool) -> None:
    command = [sys.executable, "-c", HOLD, str(job.out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(mf.OutputError, match=rf"held by process {other.pid} on "):
            mf.merge_checkpoints(job.config, job.out, resume=resume, **OPTIONS)


def test_a_finished_output_is_in_the_way(job: Job) -> None:
    job.resume()
    before = hashes(job.out)
    with pytest.raises(mf.OutputError, match="expected it missing or empty"):
        mf.merge_checkpoints(job.config, job.out, **OPTIONS)
    assert hashes(job.out) == before

"""One run at a time into one output, and what an earlier one left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from checkpoint.checkpoint_files import Faults
from checkpoint.small_output import DATA, PLANS, SPECS, make, tree, write_all
from magic_fast.checkpoint import OutputFolder, TensorSpec, open_checkpoint, plan_shards
from magic_fast.checkpoint.lock import OutputLock
from magic_fast.errors import OutputError


def test_a_second_run_in_this_process(tmp_path):
    with OutputFolder(tmp_path / "o"):
        with pytest.raises(OutputError, match=rf"lock held by process {os.getpid()} on "):
            OutputFolder(tmp_path / "o")
        OutputFolder(tmp_path / "other").abort()
    make(tmp_path / "o")


HOLD = textwrap.dedent(
    """
    import sys, time
    from magic_fast.checkpoint import OutputFolder, TensorSpec, plan_shards
    output = OutputFolder(sys.argv[1], resumable=True)
    output.create_shards(plan_shards([TensorSpec("a", "U8", (8,)), TensorSpec("b", "U8", (8,))], 8))
    output.write("a", b"ABCDEFGH")
    print("ready", flush=True)
    sys.stdin.readline()
    """
)


@pytest.fixture
def other_run(tmp_path):
    """Another process that writes to tmp_path/o and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "o")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_dies(tmp_path, other_run):
    for resume in (False, True):
        with pytest.raises(OutputError) as caught:
            OutputFolder(tmp_path / "o", resume=resume)
        message = str(caught.value)
        assert message.startswith(f"Output in use for {tmp_path / 'o'}: expected to be its only")
        assert f"lock held by process {other_run.pid} on " in message
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    plans = plan_shards([TensorSpec("a", "U8", (8,)), TensorSpec("b", "U8", (8,))], 8)
    with OutputFolder(tmp_path / "o", resume=True) as output:
        assert output.resumed
        assert output.create_shards(plans) == {plan.file for plan in plans}
        found = bytearray(8)
        output.read_into("a", found)
        assert found == b"ABCDEFGH"
        output.mark_written("a")
        output.write("b", b"12345678")
        output.finalise()
    assert bytes(open_checkpoint(tmp_path / "o").read("a")) == b"ABCDEFGH"
    assert os.listdir(tmp_path) == ["o"]


def test_at_most_one_process_holds_the_lock(tmp_path):
    script = textwrap.dedent(
        """
        import os, sys
        from magic_fast.checkpoint.lock import OutputLock
        from magic_fast.errors import OutputError
        held = 0
        while held < 100:
            try:
                lock = OutputLock(sys.argv[1] + ".lock", "out")
            except OutputError:
                continue
            os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL))  # fails if another is inside
            os.unlink(sys.argv[1])
            lock.release(remove=held % 2 == 0)
            held += 1
        """
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", script, str(tmp_path / "inside")]
    processes = [subprocess.Popen(command, env=env) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]


def test_a_lock_whose_file_is_removed_while_it_is_taken(tmp_path):
    """The holder removes the file and ends after we opened it: our lock would guard nothing."""

    class Removing(Faults):
        def open(self, path: str, flags: int) -> int:
            fd = super().open(path, flags)
            if len(self.calls) == 1:
                os.unlink(path)
            return fd

    fs = Removing()
    lock = OutputLock(str(tmp_path / "lock"), "out", fs=fs)
    assert len(fs.calls) == 2
    with pytest.raises(OutputError, match="Output in use"):
        OutputLock(str(tmp_path / "lock"), "out")
    lock.release(remove=True)
    assert os.listdir(tmp_path) == []


def test_without_resume_a_killed_run_is_cleared(tmp_path, other_run):
    other_run.kill()
    other_run.wait()
    assert sorted(os.listdir(tmp_path)) == [".o.partial", ".o.partial.lock"]
    with OutputFolder(tmp_path / "o", resumable=True) as output:
        assert not output.resumed and os.listdir(output.partial) == []
    make(tmp_path / "o")
    assert os.listdir(tmp_path) == ["o"]
    assert set(open_checkpoint(tmp_path / "o")) == {"a", "b", "c"}


def test_resume_keeps_what_fits_and_nothing_else(tmp_path):
    with OutputFolder(tmp_path / "o", resumable=True) as output:
        output.create_shards(PLANS)
        output.write("a", DATA["a"])
        Path(output.path_of("journal")).write_text("done: a")
        Path(output.path_of("stale.json")).write_text("old")
        Path(output.path_of("model-00009-of-00009.safetensors")).write_text("old")
    assert not (tmp_path / "o").exists()
    os.truncate(tmp_path / ".o.partial" / PLANS[1].file, PLANS[1].file_size - 1)
    with OutputFolder(tmp_path / "o", resume=True) as output:
        assert Path(output.path_of("journal")).read_text() == "done: a"
        assert output.create_shards(PLANS) == {PLANS[0].file}
        output.mark_written("a")
        assert set(output.missing()) == {"b", "c"}
        output.write("b", DATA["b"])
        output.write("c", DATA["c"])
        Path(output.path_of("extra.json")).write_text("{}")
        output.keep("extra.json")
        output.finalise()
    resumed = tree(tmp_path / "o")
    assert resumed.pop("extra.json") == b"{}"
    make(tmp_path / "undisturbed")
    assert resumed == tree(tmp_path / "undisturbed")  # no journal, nothing stale


def test_resume_with_another_plan_adopts_nothing(tmp_path):
    with OutputFolder(tmp_path / "o", resumable=True) as output:
        write_all(output)
    other = plan_shards([TensorSpec("A", "F32", (2, 3)), *SPECS[1:]], 24)
    with OutputFolder(tmp_path / "o", resume=True) as output:
        assert output.create_shards(other) == {PLANS[1].file}
        found = bytearray(24)
        output.read_into("A", found)
        assert found == bytes(24)  # made anew


def test_resume_with_nothing_there_starts_afresh(tmp_path):
    with OutputFolder(tmp_path / "o", resume=True) as output:
        assert not output.resumed
        write_all(output)
        output.finalise()
    assert len(open_checkpoint(tmp_path / "o")) == 3


def test_a_partial_folder_that_is_not_ours(tmp_path):
    (tmp_path / ".o.partial").mkdir()
    (tmp_path / ".o.partial" / "x").write_text("precious")
    for _ in range(2):
        with pytest.raises(OutputError, match="Unknown folder in the way"):
            OutputFolder(tmp_path / "o")
    assert tree(tmp_path) == {".o.partial/x": b"precious"}


def test_a_link_as_partial_folder_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / ".o.partial").symlink_to("precious")
    with pytest.raises(OutputError, match="Unknown folder in the way"):
        OutputFolder(tmp_path / "o")

"""Output in place, in any order, and all or nothing under the final name."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint.checkpoint_files import Faults
from magic_fast.checkpoint import OutputFolder, TensorSpec, open_checkpoint, plan_shards
from magic_fast.checkpoint.lock import OutputLock
from magic_fast.errors import CheckpointError, InternalError, OutputError

SPECS = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "U8", (5,)), TensorSpec("c", "I64", ())]
DATA = {"a": bytes(range(24)), "b": b"hello", "c": bytes(8)}
PLANS = plan_shards(SPECS, 24)


def write_all(output: OutputFolder, plans=PLANS) -> None:
    output.create_shards(plans)
    for name, data in DATA.items():
        output.write(name, data)


def make(path: Path, **options) -> str:
    with OutputFolder(path, **options) as output:
        write_all(output)
        return output.finalise()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_whole_output_read_by_both(tmp_path):
    out = tmp_path / "sub" / "out"
    with OutputFolder(out) as output:
        assert output.path == str(out) and not output.is_file and not output.resumed
        assert output.partial == str(tmp_path / "sub" / ".out.partial")
        write_all(output)
        output.write_text("config.json", "{}\n")
        output.write_text("templates/x.jinja", "ü")
        assert not out.exists()
        assert output.finalise() == str(out)
    assert os.listdir(tmp_path / "sub") == ["out"]  # no lock, no partial folder
    assert sorted(os.listdir(out)) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "templates",
    ]
    assert (out / "templates" / "x.jinja").read_text(encoding="utf-8") == "ü"
    ours = open_checkpoint(out)
    assert {name: bytes(ours.read(name)) for name in ours} == DATA
    assert ours.metadata == {"format": "pt"}
    theirs = {}
    for path in out.glob("*.safetensors"):
        theirs.update(load_file(path))
    assert {name: array.tobytes() for name, array in theirs.items()} == DATA
    assert theirs["a"].shape == (2, 3) and theirs["c"].shape == ()


def test_torch_views_mixed_dtypes(tmp_path):
    load = pytest.importorskip("safetensors.torch").load_file
    specs = [
        TensorSpec("u", "U8", (3,)),
        TensorSpec("f", "F32", (2,)),
        TensorSpec("h", "BF16", (1,)),
        TensorSpec("l", "I64", (1,)),
    ]
    with OutputFolder(tmp_path / "o") as output:
        output.create_shards(plan_shards(specs))
        output.write("f", np.array([1.5, 2.5], np.float32))
        for spec in specs:
            if spec.name != "f":
                output.write(spec.name, bytes(spec.nbytes))
        output.finalise()
    tensors = load(tmp_path / "o" / "model.safetensors")
    assert tensors["f"].tolist() == [1.5, 2.5] and tensors["l"].tolist() == [0]


def test_one_shard_has_no_index(tmp_path):
    with OutputFolder(tmp_path / "o") as output:
        write_all(output, plan_shards(SPECS))
        output.finalise()
    assert os.listdir(tmp_path / "o") == ["model.safetensors"]


def test_same_bytes_every_time(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "y")
    assert tree(tmp_path / "x") == tree(tmp_path / "y")


def test_bare_file(tmp_path):
    out = tmp_path / "merged.safetensors"
    with OutputFolder(out) as output:
        assert output.is_file
        write_all(output, plan_shards(SPECS, 4, file_name="merged.safetensors"))
        with pytest.raises(InternalError, match="Wrong small file"):
            output.write_text("config.json", "{}")
        assert not out.exists()
        output.finalise()
    assert os.listdir(tmp_path) == ["merged.safetensors"]
    assert {name: array.tobytes() for name, array in load_file(out).items()} == DATA


def test_threads_write_ranges_in_any_order(tmp_path):
    rows, width = 40, 1000
    specs = [TensorSpec(f"t{n}", "I32", (rows, width)) for n in range(40)]
    pieces = [(n, row) for n in range(len(specs)) for row in range(rows)]
    random.Random(0).shuffle(pieces)
    with OutputFolder(tmp_path / "o") as output:
        output.create_shards(plan_shards(specs, 4 * rows * width))  # more shards than open files

        def write(piece: tuple[int, int]) -> None:
            n, row = piece
            output.write(f"t{n}", np.full(width, n * rows + row, np.int32), 4 * width * row)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, pieces))
        assert not output.missing()
        output.finalise()
    model = open_checkpoint(tmp_path / "o")
    assert len(model.files) == 40
    for n in range(len(specs)):
        array = np.frombuffer(model.read(f"t{n}"), np.int32).reshape(rows, width)
        assert (array == n * rows + np.arange(rows)[:, None]).all()


def test_gaps_are_never_called_whole(tmp_path):
    with pytest.raises(InternalError, match=r"gaps in 1, first 'a' at \[\(8, 12\)\]"):
        with OutputFolder(tmp_path / "o") as output:
            output.create_shards(PLANS)
            output.write("a", bytes(8))
            output.write("a", bytes(12), 12)
            output.write("b", bytes(5))
            output.write("c", bytes(8))
            assert output.missing() == {"a": [(8, 12)]}
            output.finalise()
    assert os.listdir(tmp_path) == []
    with pytest.raises(InternalError, match="Incomplete output"), OutputFolder(tmp_path / "o") as o:
        o.finalise()  # without any shards


@pytest.mark.parametrize(("start", "size"), [(-1, 1), (0, 25), (24, 1), (20, 5), (2**64, 1)])
def test_ranges_outside_a_tensor(tmp_path, start, size):
    with OutputFolder(tmp_path / "o") as output:
        output.create_shards(PLANS)
        with pytest.raises(InternalError, match="Range outside the tensor for 'a'"):
            output.write("a", bytes(size), start)
        with pytest.raises(InternalError, match=r"Unplanned tensor for .*'x'"):
            output.write("x", b"")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        with OutputFolder(tmp_path / "o") as output:
            write_all(output)
            raise error
    assert os.listdir(tmp_path) == []


def test_leaving_without_finalise_leaves_nothing(tmp_path):
    with OutputFolder(tmp_path / "o") as output:
        write_all(output)
    assert os.listdir(tmp_path) == []
    output.abort()  # again is harmless


def test_folder_not_empty(tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError) as caught:
        OutputFolder(tmp_path / "o")
    assert str(caught.value).startswith(f"Output folder not empty for {tmp_path / 'o'}: expected")
    assert "1 entries (model.safetensors)" in str(caught.value)
    assert os.listdir(tmp_path) == ["o"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "o").mkdir()
    make(tmp_path / "o")
    assert len(open_checkpoint(tmp_path / "o")) == 3


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "o").symlink_to("real")
    make(tmp_path / "o")
    assert (tmp_path / "o").is_symlink() and len(open_checkpoint(tmp_path / "real")) == 3


@pytest.mark.parametrize("name", ["o", "o.safetensors"])
def test_a_file_in_the_way(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match="Output exists for"):
        OutputFolder(tmp_path / name)
    assert (tmp_path / name).read_text() == "precious"


def test_a_file_where_the_parent_should_be(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="Writing failed for"):
        OutputFolder(tmp_path / "x" / "o")


def test_a_name_too_long(tmp_path):
    with pytest.raises(OutputError, match="File name too long"):
        OutputFolder(tmp_path / ("o" * 252))


def test_a_mount_point(tmp_path, monkeypatch):
    (tmp_path / "o").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path / "o"))
    with pytest.raises(OutputError, match="Output is a mount point"):
        OutputFolder(tmp_path / "o")


def test_output_that_appears_meanwhile_is_not_touched(tmp_path):
    with pytest.raises(OutputError, match="Output folder not empty"):
        with OutputFolder(tmp_path / "o") as output:
            write_all(output)
            (tmp_path / "o").mkdir()
            (tmp_path / "o" / "x").write_text("precious")
            output.finalise()
    assert os.listdir(tmp_path) == ["o"] and os.listdir(tmp_path / "o") == ["x"]


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


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "/x", "a//b", "x.safetensors", "model.safetensors.index.json"]
)
def test_names_of_small_files(tmp_path, name):
    with OutputFolder(tmp_path / "o") as output:
        with pytest.raises(InternalError, match="Wrong small file"):
            output.write_text(name, "")


def test_copies_follow_links_and_leave_the_source(tmp_path):
    (tmp_path / "blob").write_bytes(b"x" * (3 << 20) + b"end")
    (tmp_path / "tokenizer.json").symlink_to("blob")
    (tmp_path / "empty").write_bytes(b"")
    with OutputFolder(tmp_path / "o") as output:
        write_all(output)
        output.copy_file(tmp_path / "tokenizer.json")
        output.copy_file(tmp_path / "empty", "other.txt")
        with pytest.raises(CheckpointError, match=r"Reading failed for .*nowhere"):
            output.copy_file(tmp_path / "nowhere")
        output.finalise()
    copy = tmp_path / "o" / "tokenizer.json"
    assert not copy.is_symlink() and copy.read_bytes() == (tmp_path / "blob").read_bytes()
    assert (tmp_path / "o" / "other.txt").read_bytes() == b""


def test_plans_must_fit_the_output(tmp_path):
    with OutputFolder(tmp_path / "x.safetensors") as output:
        with pytest.raises(InternalError, match="Wrong shards"):
            output.create_shards(PLANS)
    with OutputFolder(tmp_path / "o") as output:
        output.create_shards(PLANS)
        with pytest.raises(InternalError, match="Wrong shards"):
            output.create_shards(PLANS)


def test_order_of_the_last_steps(tmp_path):
    """All data reaches the disk, then the index, then the folder; one rename; then the parent."""
    faults = Faults()
    with OutputFolder(tmp_path / "o", fs=faults) as output:
        write_all(output)
        output.write_text("config.json", "{}")
        faults.calls.clear()
        output.finalise()
    steps = [call for call in faults.calls if call[0] in ("fsync", "rename")]
    assert steps == [
        ("fsync", "config.json"),
        ("fsync", PLANS[0].file),
        ("fsync", PLANS[1].file),
        ("fsync", "model.safetensors.index.json"),
        ("fsync", ".o.partial"),
        ("rename", "o"),
        ("fsync", tmp_path.name),
    ]


def test_index_as_hugging_face_writes_it(tmp_path):
    make(tmp_path / "o")
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 37}
    assert list(index["weight_map"]) == sorted(DATA)


def test_killed_at_random_instants_never_leaves_half_an_output(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from magic_fast.checkpoint import OutputFolder, TensorSpec, plan_shards
        specs = [TensorSpec(f"t{n}", "U8", (64,)) for n in range(40)]
        print("ready", flush=True)
        with OutputFolder(sys.argv[1]) as output:
            output.create_shards(plan_shards(specs, 64))
            for n in range(40):
                output.write(f"t{n}", bytes([n]) * 64)
            output.finalise()
        """
    )
    chance = random.Random(7)
    outcomes = set()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for attempt in range(8):
        out = tmp_path / f"o{attempt}"
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, env=env
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            process.wait(chance.uniform(0, 0.05) if attempt else None)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        outcomes.add(out.exists())
        if out.exists():
            model = open_checkpoint(out)
            assert all(bytes(model.read(f"t{n}")) == bytes([n]) * 64 for n in range(40))
            assert len(os.listdir(out)) == 41
    assert True in outcomes  # the first is left to finish

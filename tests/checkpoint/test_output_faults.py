"""Faults under the file functions: each ends in a clear error and in no output."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.checkpoint_files import Faults
from magic_fast.checkpoint import FileSystem, OutputFolder, TensorSpec, open_checkpoint, plan_shards
from magic_fast.errors import CheckpointError, OutputError

SPECS = [TensorSpec("a", "U8", (100,)), TensorSpec("b", "U8", (50,))]
PLANS = plan_shards(SPECS, 100)
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
EIO = OSError(errno.EIO, "Input/output error")


def run(path, faults, **options):
    with OutputFolder(path, fs=faults, **options) as output:
        output.create_shards(PLANS)
        output.write("a", bytes(range(100)))
        output.write("b", bytes(50))
        output.write_text("config.json", "{}")
        output.finalise()


def test_short_writes_are_continued(tmp_path):
    faults = Faults()
    faults.at_most = 7
    run(tmp_path / "o", faults)
    assert open_checkpoint(tmp_path / "o").read("a") == bytes(range(100))


def test_a_write_of_nothing_is_an_error(tmp_path):
    faults = Faults()
    faults.at_most = 0
    with pytest.raises(OutputError, match="accepted no bytes"):
        run(tmp_path / "o", faults)
    assert os.listdir(tmp_path) == []


def test_too_little_room_is_seen_before_any_work(tmp_path):
    faults = Faults()
    faults.free = 300
    needed = sum(plan.file_size for plan in PLANS)
    with pytest.raises(OutputError) as caught:
        run(tmp_path / "o", faults)
    assert str(caught.value).startswith(
        f"Disk full for {tmp_path / 'o'}: expected room for {needed} bytes, got 300 bytes free."
    )
    assert not any(call == "allocate" for call, _ in faults.calls)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [NO_SPACE, OSError(errno.EDQUOT, "Disk quota exceeded")])
def test_no_room_while_reserving(tmp_path, error):
    faults = Faults()
    faults.fail[f"allocate {PLANS[1].file}"] = error
    with pytest.raises(OutputError) as caught:
        run(tmp_path / "o", faults)
    message = str(caught.value)
    assert message.startswith("Disk full for ") and PLANS[1].file in message
    assert f"expected room for {PLANS[1].file_size} bytes, got " in message
    assert "bytes free. Free space, or choose another disk." in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve(tmp_path, code):
    faults = Faults()
    faults.fail["allocate"] = OSError(code, "not supported")
    run(tmp_path / "o", faults)
    assert open_checkpoint(tmp_path / "o").read("a") == bytes(range(100))


def test_a_system_without_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    run(tmp_path / "o", Faults())
    assert open_checkpoint(tmp_path / "o").read("a") == bytes(range(100))


def test_full_disk_while_writing_names_the_tensor(tmp_path):
    faults = Faults()
    with pytest.raises(OutputError) as caught:
        with OutputFolder(tmp_path / "o", fs=faults) as output:
            output.create_shards(PLANS)
            faults.fail["pwrite"] = NO_SPACE
            output.write("b", bytes(50))
    message = str(caught.value)
    assert message.startswith("Disk full for tensor 'b' in ") and PLANS[1].file in message
    assert "expected room for 50 bytes, got " in message
    assert os.listdir(tmp_path) == []


def test_write_error_names_the_tensor(tmp_path):
    faults = Faults()
    with pytest.raises(OutputError, match=r"Writing failed for tensor 'a' in .*Input/output error"):
        with OutputFolder(tmp_path / "o", fs=faults) as output:
            output.create_shards(PLANS)
            faults.fail["pwrite"] = EIO
            output.write("a", bytes(50))
    assert output.missing()["a"] == [(0, 100)]


STEPS = (
    f"open {PLANS[0].file}", f"allocate {PLANS[0].file}", "pwrite", f"fsync {PLANS[0].file}",
    "fsync config.json", "open config.json", "fsync model.safetensors.index.json",
    "open model.safetensors.index.json", "pwrite model.safetensors.index.json", "fsync .o.partial",
    "rename", "open .o.partial.lock",
)  # fmt: skip


@pytest.mark.parametrize("error", [NO_SPACE, EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("step", STEPS)
def test_any_step_may_fail(tmp_path, step, error):
    faults = Faults()
    faults.fail[step] = error
    with pytest.raises(OutputError) as caught:
        run(tmp_path / "o", faults)
    assert ("Disk full" if error is NO_SPACE else "Writing failed") in str(caught.value)
    assert os.listdir(tmp_path) == []
    run(tmp_path / "o", Faults())  # and nothing hinders the next run


@pytest.mark.parametrize("step", STEPS[:-1])
def test_any_step_may_fail_and_be_resumed(tmp_path, step):
    faults = Faults()
    faults.fail[step] = NO_SPACE
    with pytest.raises(OutputError):
        run(tmp_path / "o", faults, resumable=True)
    assert not (tmp_path / "o").exists() and (tmp_path / ".o.partial").is_dir()
    run(tmp_path / "o", Faults(), resume=True)
    run(tmp_path / "undisturbed", Faults())
    for name in os.listdir(tmp_path / "undisturbed"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("o", "undisturbed"))
        assert first == second
    assert sorted(os.listdir(tmp_path)) == ["o", "undisturbed"]


def test_the_parent_that_cannot_be_synced_is_told_but_the_output_is_whole(tmp_path):
    faults = Faults()
    faults.fail[f"fsync {tmp_path.name}"] = EIO
    with pytest.raises(OutputError, match="Writing failed"):
        run(tmp_path / "o", faults)
    assert os.listdir(tmp_path) == ["o"] and len(open_checkpoint(tmp_path / "o")) == 2


def test_bare_file_faults(tmp_path):
    faults = Faults()
    faults.fail["rename"] = EIO
    with pytest.raises(OutputError, match="Writing failed"):
        with OutputFolder(tmp_path / "x.safetensors", fs=faults) as output:
            output.create_shards(plan_shards(SPECS, file_name="x.safetensors"))
            output.write("a", bytes(100))
            output.write("b", bytes(50))
            output.finalise()
    assert os.listdir(tmp_path) == []


def test_read_back_faults(tmp_path):
    faults = Faults()
    with OutputFolder(tmp_path / "o", fs=faults) as output:
        output.create_shards(PLANS)
        faults.fail["pread"] = EIO
        with pytest.raises(CheckpointError, match="Reading failed for tensor 'a' in"):
            output.read_into("a", bytearray(4), 8)
        faults.fail.clear()
        os.truncate(output.path_of(PLANS[0].file), PLANS[0].tensors[0].offset + 10)
        with pytest.raises(CheckpointError, match="Shard too short for tensor 'a' in"):
            output.read_into("a", bytearray(4), 8)


def test_no_descriptor_is_left_open(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    run(tmp_path / "good", Faults())
    for step in STEPS:
        faults = Faults()
        faults.fail[step] = EIO
        with pytest.raises(OutputError):
            run(tmp_path / "o", faults)
    assert set(os.listdir("/proc/self/fd")) == before


@settings(max_examples=40, deadline=None)
@given(at_most=st.integers(1, 40), nth=st.integers(0, 60), code=st.sampled_from(["EIO", "ENOSPC"]))
def test_the_nth_call_fails(tmp_path_factory, at_most, nth, code):
    """Wherever a fault strikes: an error and nothing there, or the whole output."""

    class Nth(Faults):
        def _step(self, name: str, path: str) -> None:
            super()._step(name, path)
            if len(self.calls) == nth + 1:
                raise OSError(getattr(errno, code), "struck")

    folder = tmp_path_factory.mktemp("nth")
    faults = Nth()
    faults.at_most = at_most
    try:
        run(folder / "o", faults)
    except OutputError:
        # Only the parent's fsync comes after the rename.
        assert os.listdir(folder) in ([], ["o"])
    if (folder / "o").exists():
        assert open_checkpoint(folder / "o").read("a") == bytes(range(100))
        assert any(call == "rename" for call, _ in faults.calls)
    else:
        assert os.listdir(folder) == []


def test_the_disk_begins_while_more_is_written(tmp_path, monkeypatch):
    """Of ranges that are worth a call; the bytes are those that were written, as ever."""
    begun = []
    real = FileSystem.start_writing

    def start_writing(own, fd, offset, nbytes):
        begun.append(nbytes)
        real(own, fd, offset, nbytes)

    monkeypatch.setattr(FileSystem, "start_writing", start_writing)
    data = os.urandom(3 << 20)
    with OutputFolder(tmp_path / "o") as output:
        output.create_shards(plan_shards([TensorSpec("a", "U8", (len(data),))]))
        output.write("a", data[: 2 << 20])
        output.write("a", data[2 << 20 : -(1 << 19)], 2 << 20)
        output.write("a", data[-(1 << 19) :], len(data) - (1 << 19))
        output.finalise()
    assert begun == [2 << 20]  # the others are smaller than 1 MiB
    assert bytes(open_checkpoint(tmp_path / "o").read("a")) == data


def test_a_system_that_cannot_be_told_to_begin(tmp_path, monkeypatch):
    monkeypatch.setattr("magic_fast.checkpoint.fs._sync_file_range", lambda: None)
    with OutputFolder(tmp_path / "o") as output:
        output.create_shards(plan_shards([TensorSpec("a", "U8", (1 << 20,))]))
        output.write("a", bytes(1 << 20))
        output.finalise()
    assert (tmp_path / "o").is_dir()

"""Faults under a running merge: a clear error, nothing under the final name, resumable."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, Models, write_model
from engine.hashing import hashes
from magic_fast.checkpoint import FileSystem
from magic_fast.engine.execute import streamed as stages
from support.backends import available_backends

SHAPES = {"a.weight": (101, 701), "b.weight": (64, 48), "c.bias": (150_001,), "d": ()}
OPTIONS: dict[str, Any] = {"memory": 4 * MIB, "max_shard_size": 400_000}
BACKENDS = [b for b in available_backends() if b in ("native", "torch")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("m") / "m", SHAPES, ((torch.float32,),) * 4)


@pytest.fixture(scope="module")
def config(models: Models) -> str:
    return models.config("ties", parameters={"density": 0.3, "weight": 0.7}, calibrate="wsc")


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(config: str, backend: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    mf.merge_checkpoints(config, out, backend=backend, **OPTIONS)
    return hashes(out)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


class Faults:
    """What file functions do from now on, in every object of ours.

    Args:
        patch: undoes it.
        name: of the function.
        fault: called with the number of the call, its path and its arguments; may raise, or
            return what the function shall return instead.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, name: str, fault: Callable[[int, str, Any], Any]
    ) -> None:
        self.calls = 0
        real, lock = getattr(FileSystem, name), threading.Lock()

        def faulty(own: FileSystem, fd: Any, *arguments: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{fd}") if isinstance(fd, int) else str(fd)
            with lock:
                self.calls += 1
                number = self.calls
            instead = fault(number, path, arguments)
            return real(own, fd, *arguments) if instead is None else instead

        patch.setattr(FileSystem, name, faulty)


def error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def check(
    config: str,
    out: Path,
    backend: str,
    whole: dict[str, str],
    patch: pytest.MonkeyPatch,
    fault: tuple[str, Callable[[int, str, Any], Any]],
    expected: type[mf.MagicFastError],
) -> str:
    """The message of the error; the run is resumed to the bytes of an undisturbed one."""
    with patch.context() as patched, pytest.raises(expected) as caught:
        Faults(patched, *fault)
        mf.merge_checkpoints(config, out, backend=backend, **OPTIONS)
    assert not out.exists()
    mf.merge_checkpoints(config, out, backend=backend, resume=True, **OPTIONS)
    assert hashes(out) == whole
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]
    return str(caught.value)


@pytest.mark.parametrize("number", [1, 2, 5, 8, 11, 14])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_fails(
    config: str, backend: str, whole: dict[str, str], number: int, code: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Headers, tensors, lines of the journal, small files: whatever the n-th write is."""
    seen = []

    def fault(call: int, path: str, arguments: Any) -> None:
        if call >= number:  # a full disk stays full
            seen.append(path)
            raise error(code)

    message = check(
        config, tmp_path / "out", backend, whole, monkeypatch, ("pwrite", fault), mf.OutputError
    )
    assert seen[0].startswith(str(tmp_path))
    if code == errno.ENOSPC:
        assert message.startswith("Disk full for ") and "bytes free" in message
    else:
        assert message.startswith("Writing failed for ") and "Input/output error" in message
    assert os.path.basename(seen[0]) in message


@pytest.mark.parametrize(
    ("name", "end"), [("fsync", ".safetensors"), ("fsync", "magic_fast.json"), ("rename", "")]
)
def test_sealing_fails(
    config: str, backend: str, whole: dict[str, str], name: str, end: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fault(call: int, path: str, arguments: Any) -> None:
        if path.endswith(end) or name == "rename":
            raise error(errno.EIO)

    message = check(
        config, tmp_path / "out", backend, whole, monkeypatch, (name, fault), mf.OutputError
    )
    assert "Input/output error" in message


@pytest.mark.parametrize("nth", [1, 3])
def test_a_read_fails(
    config: str, backend: str, whole: dict[str, str], nth: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A read of data, that is: those of headers come first and are small."""
    seen: list[str] = []

    def fault(call: int, path: str, arguments: Any) -> None:
        if path.endswith("expert-1/model.safetensors") and arguments[1] > 4096:
            seen.append(path)
            if len(seen) == nth:
                raise error(errno.EIO)

    message = check(
        config, tmp_path / "out", backend, whole, monkeypatch, ("pread", fault), mf.CheckpointError
    )
    assert message.startswith("Reading failed for tensor '")
    assert "expert-1/model.safetensors" in message and "Input/output error" in message


@pytest.mark.parametrize("name", ["pread", "pwrite"])
def test_short_reads_and_writes(
    config: str, backend: str, whole: dict[str, str], name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The system may transfer less than was asked for."""
    real = getattr(FileSystem, name)
    counts = []

    def short(own: FileSystem, fd: int, data: memoryview, offset: int) -> int:
        counts.append(real(own, fd, data[: max(len(data) // 3, 1)], offset))
        return int(counts[-1])

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, name, short)
        mf.merge_checkpoints(config, tmp_path / "out", backend=backend, **OPTIONS)
    assert hashes(tmp_path / "out") == whole
    assert len(counts) > 100


def change_while_reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """``change`` happens when four units have been read."""
    real, calls = stages.Loader.__call__, []

    def load(own: stages.Loader, unit: Any, slot: Any) -> None:
        calls.append(unit)
        if len(calls) == 5:
            change()
        real(own, unit, slot)

    monkeypatch.setattr(stages.Loader, "__call__", load)


@pytest.mark.parametrize("how", ["cut", "gone", "replaced", "written"])
def test_an_input_changes_during_the_run(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the journal by then was made of the input as it had been."""
    models = Models(tmp_path / "m", SHAPES, ((torch.float32,),) * 4)
    config = models.config("ties", parameters={"density": 0.3, "weight": 0.7}, calibrate="wsc")
    mf.merge_checkpoints(config, tmp_path / "whole" / "out", **OPTIONS)
    path, out = models.folder / "expert-2" / "model.safetensors", tmp_path / "runs" / "out"
    data, status = path.read_bytes(), path.stat()

    def change() -> None:
        if how == "cut":
            os.truncate(path, 5000)
        elif how == "gone":
            path.rename(path.with_suffix(".moved"))
        elif how == "replaced":
            path.with_suffix(".new").write_bytes(data)
            path.with_suffix(".new").rename(path)
        else:
            with open(path, "r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\0\0")

    with monkeypatch.context() as patch, pytest.raises(mf.CheckpointError) as caught:
        change_while_reading(patch, change)
        mf.merge_checkpoints(config, out, **OPTIONS)
    message = str(caught.value)
    assert message.startswith(("File changed while", "File shrank while")) and str(path) in message
    assert not out.exists() and out.with_name(".out.partial").exists()

    if how == "gone":  # it comes back as it was
        path.with_suffix(".moved").rename(path)
    else:
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    mf.merge_checkpoints(config, out, resume=True, **OPTIONS)
    assert hashes(out) == hashes(tmp_path / "whole" / "out")


@pytest.mark.parametrize("memory", [4 * MIB, 64 * MIB])
def test_infinities_are_named_and_nothing_is_kept(memory: int, tmp_path: Path) -> None:
    """In the last piece; the flat index is that of the whole tensor. It would come again, so there
    is nothing to resume."""
    models = Models(tmp_path / "m", SHAPES, ((torch.float32,),) * 4)
    bad = {n: t.clone() for n, t in models.experts[1].items()}
    bad["c.bias"][150_000] = torch.inf
    write_model(tmp_path / "bad", bad)
    config = models.config("ties", parameters={"density": 0.3, "weight": 0.7})
    config = config.replace(str(models.folder / "expert-1"), str(tmp_path / "bad"))
    with pytest.raises(mf.NonFiniteError) as caught:
        mf.merge_checkpoints(config, tmp_path / "runs" / "out", memory=memory)
    assert "c.bias" in str(caught.value) and "150000" in str(caught.value)
    assert list((tmp_path / "runs").iterdir()) == []

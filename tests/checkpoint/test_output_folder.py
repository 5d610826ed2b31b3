"""Output in place, in any order, and all or nothing under the final name."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint.checkpoint_files import Faults
from checkpoint.small_output import DATA, PLANS, SPECS, make, tree, write_all
from magic_fast.checkpoint import OutputFolder, TensorSpec, open_checkpoint, plan_shards
from magic_fast.errors import CheckpointError, InternalError, OutputError


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

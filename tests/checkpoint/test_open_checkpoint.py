"""Opening and reading well-formed checkpoints of every layout, from many threads."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint.checkpoint_files import Faults, entry, raw_file, two_shards, write_sharded
from magic_fast.checkpoint import FileReader, InputFile, changed_inputs, open_checkpoint
from magic_fast.errors import CheckpointError, InternalError


def test_sharded_folder(tmp_path):
    with open_checkpoint(two_shards(tmp_path / "m")) as model:
        assert list(model) == ["b", "a", "c"]  # file, then offset: the library puts I64 first
        assert len(model) == 3 and "a" in model and "d" not in model
        assert model.tensors["a"].shape == (2, 3) and model.tensors["a"].dtype == "F32"
        assert np.frombuffer(model.read("b"), np.int64).tolist() == [0, 1, 2, 3, 4]
        assert np.frombuffer(model.read("c"), np.float16) == 7
        assert model.nbytes == 24 + 40 + 2
        assert model.config == {"tie_word_embeddings": False}
        assert model.metadata == {"format": "pt"}
        assert model.folder == str(tmp_path / "m")


def test_bytes_are_where_the_info_says(tmp_path):
    model = open_checkpoint(two_shards(tmp_path))
    for name, info in model.tensors.items():
        with open(info.path, "rb") as file:
            file.seek(info.offset)
            assert file.read(info.nbytes) == model.read(name)


def test_one_file_of_any_name_and_a_bare_file(tmp_path):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "adapter.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x", "limit": Infinity}')
    folder = open_checkpoint(tmp_path)
    assert folder.config["model_type"] == "x"
    bare = open_checkpoint(tmp_path / "adapter.safetensors")
    assert bare.read("w") == folder.read("w")
    assert bare.folder is None and bare.config == {} and not bare.aliases


def test_model_safetensors_is_preferred_without_an_index(tmp_path):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    save_file({"v": np.ones(2, np.float32)}, tmp_path / "consolidated.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["w"]


def test_an_index_of_shards_that_are_gone_is_stale(tmp_path, caplog):
    """As transformers reads it: a folder that was saved again as one file."""
    two_shards(tmp_path)
    shards = sorted(tmp_path.glob("model-*"))
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    shards[0].unlink()
    with pytest.raises(CheckpointError, match="Missing shard"):
        open_checkpoint(tmp_path)
    shards[1].unlink()
    assert list(open_checkpoint(tmp_path)) == ["w"]
    assert "names files that are all gone" in caplog.text


def test_index_is_preferred_to_other_files(tmp_path):
    two_shards(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "consolidated.safetensors")
    assert len(open_checkpoint(tmp_path)) == 3


def test_numbered_shards_without_an_index(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "consolidated.safetensors")
    model = open_checkpoint(tmp_path)
    assert set(model) == {"a", "b", "c"} and model.tensors["a"].shape == (2, 3)


def test_index_of_another_name(tmp_path):
    two_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    assert len(open_checkpoint(tmp_path)) == 3


def test_a_hub_cache_is_made_of_links(tmp_path):
    model = two_shards(tmp_path / "m")
    snapshot = tmp_path / "cache" / "snapshots" / "rev"
    blobs = tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        blob = blobs / hashlib.sha256(path.name.encode()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", blob.name))
    assert len(open_checkpoint(snapshot).read("a")) == 24


def test_home_and_relative_paths(tmp_path, monkeypatch):
    two_shards(tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_checkpoint("~/m")) == 3
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("m").path == str(tmp_path / "m")


def test_ranges_into_any_buffer(tmp_path):
    model = open_checkpoint(two_shards(tmp_path))
    whole = model.read("a")
    target = np.zeros((2, 3), np.float32)
    assert model.read_into("a", target) == 24
    assert target.tobytes() == whole
    part = bytearray(b"." * 10)
    assert model.read_into("a", memoryview(part)[2:], start=5, nbytes=7) == 7
    assert part == b".." + whole[5:12] + b"."
    assert model.read_into("a", bytearray(), start=24) == 0
    assert model.read_into("a", np.zeros((0, 3)), nbytes=0) == 0


@pytest.mark.parametrize(
    ("start", "nbytes"), [(-1, None), (25, None), (0, 25), (20, 5), (0, -1), (2**70, 1)]
)
def test_ranges_outside_a_tensor(tmp_path, start, nbytes):
    model = open_checkpoint(two_shards(tmp_path))
    with pytest.raises(InternalError, match="Range outside the tensor for 'a'"):
        model.read_into("a", bytearray(100), start, nbytes)


def test_buffers_that_do_not_fit(tmp_path):
    model = open_checkpoint(two_shards(tmp_path))
    with pytest.raises(InternalError, match="expected 24 writable bytes, got 23 writable"):
        model.read_into("a", bytearray(23))
    with pytest.raises(InternalError, match="got 24 read-only"):
        model.read_into("a", bytes(24))
    with pytest.raises(TypeError, match="contiguous"):
        model.read_into("a", np.zeros((6, 2), np.float32)[:, 0])


def test_missing_tensor_names_the_nearest(tmp_path):
    save_file({"model.norm.weight": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'model\.norm\.wieght' in .*like 'model\.norm\.weight'"
    ):
        open_checkpoint(tmp_path).read("model.norm.wieght")


def test_threads_and_few_files(tmp_path):
    shards = [{f"t{n}": np.full(5000, n, np.int32)} for n in range(12)]
    write_sharded(tmp_path, shards)
    reader = FileReader(max_open=3)
    first, second = (open_checkpoint(tmp_path, reader=reader) for _ in range(2))
    before = len(os.listdir("/proc/self/fd"))

    def reads(n: int) -> bool:
        buffer = bytearray(28)
        (first if n % 3 else second).read_into(f"t{n % 12}", buffer, 4 * (n % 4000), 28)
        return np.frombuffer(buffer, np.int32).tolist() == [n % 12] * 7

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(reads, range(3000)))
    assert len(reader._handles) <= 3
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    first.close()  # shared: not its to close
    assert len(reader._handles) > 0
    reader.close()
    assert len(reader._handles) == 0
    assert len(first.read("t0")) == 20000  # opens again, and keeps open
    assert len(reader._handles) == 1
    reader.close()


def test_context_manager_closes_its_files(tmp_path):
    two_shards(tmp_path)
    before = set(os.listdir("/proc/self/fd"))
    with open_checkpoint(tmp_path) as model:
        model.read("a")
    assert set(os.listdir("/proc/self/fd")) == before


def test_short_reads_are_continued(tmp_path):
    two_shards(tmp_path)
    faults = Faults()
    faults.at_most = 3
    model = open_checkpoint(tmp_path, reader=FileReader(fs=faults))
    assert model.read("b") == open_checkpoint(tmp_path).read("b")


def test_read_error_names_tensor_and_file(tmp_path):
    two_shards(tmp_path)
    faults = Faults()
    model = open_checkpoint(tmp_path, reader=FileReader(fs=faults))
    faults.fail["pread"] = OSError(5, "Input/output error")
    with pytest.raises(CheckpointError) as caught:
        model.read("c")
    message = str(caught.value)
    assert message.startswith("Reading failed for tensor 'c' in ")
    assert "model-00002-of-00002.safetensors" in message and "got Input/output error" in message


def test_a_file_that_shrinks(tmp_path):
    two_shards(tmp_path)
    model = open_checkpoint(tmp_path)
    os.truncate(model.tensors["c"].path, model.tensors["c"].offset + 1)
    with pytest.raises(CheckpointError, match="File shrank while being read for tensor 'c' in"):
        model.read("c")


@pytest.mark.parametrize("how", ["replaced", "touched", "removed"])
def test_a_file_that_changes_between_openings(tmp_path, how):
    two_shards(tmp_path)
    model = open_checkpoint(tmp_path)
    model.close()
    path = model.tensors["c"].path
    if how == "replaced":
        status = os.stat(path)
        copy = path + ".copy"
        with open(path, "rb") as source, open(copy, "wb") as target:
            target.write(source.read())
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(copy, path)
    elif how == "touched":
        os.utime(path, ns=(0, 0))
    else:
        os.unlink(path)
    expected = "No such file" if how == "removed" else "File changed while being read"
    with pytest.raises(CheckpointError, match=expected):
        model.read("c")


def test_identity_of_the_inputs(tmp_path):
    two_shards(tmp_path)
    before = open_checkpoint(tmp_path).files
    assert [os.path.basename(file.path)[:11] for file in before] == ["model-00001", "model-00002"]
    restored = [InputFile.from_dict(json.loads(json.dumps(file.to_dict()))) for file in before]
    assert changed_inputs(restored, open_checkpoint(tmp_path).files) == []
    os.utime(before[0].path, ns=(0, 1))
    (found,) = changed_inputs(restored, open_checkpoint(tmp_path).files)
    assert found.startswith(before[0].path) and "modification time" in found
    other = InputFile(before[0].path, before[0].size, 1, "00")
    assert "header changed" in changed_inputs(restored[:1], [other])[0]
    assert "no longer an input" in changed_inputs(restored, restored[:1])[0]
    assert "was not an input" in changed_inputs(restored[:1], restored)[0]


def test_reading_leaves_the_inputs_as_they_were(tmp_path):
    two_shards(tmp_path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    with open_checkpoint(tmp_path) as model:
        for name in model:
            model.read(name)
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}


def test_a_tensor_beside_the_index_in_its_shard_is_there(tmp_path):
    two_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    assert "b" in open_checkpoint(tmp_path)


def test_unaligned_data_is_read(tmp_path):
    file = raw_file({"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])}, b"?\0\0\x80?")
    (tmp_path / "x.safetensors").write_bytes(file)
    assert open_checkpoint(tmp_path).read("b") == b"\0\0\x80?"


@pytest.mark.parametrize(
    ("stored", "config", "alias"),
    [
        ("model.embed_tokens.weight", {"tie_word_embeddings": True}, "lm_head.weight"),
        ("model.embed_tokens.weight", {"model_type": "gemma"}, "lm_head.weight"),
        ("model.embed_tokens.weight", {"tie_word_embeddings": False}, None),
        ("model.embed_tokens.weight", {"architectures": ["LlamaModel"]}, None),
        ("transformer.wte.weight", {"architectures": ["GPT2LMHeadModel"]}, "lm_head.weight"),
        ("model.embed_tokens.weight", {}, None),
        ("model.embed_tokens.weight", {"model_type": "llama"}, None),  # by its class
        (
            "language_model.model.embed_tokens.weight",
            {"model_type": "llava", "text_config": {"tie_word_embeddings": True}},
            "lm_head.weight",
        ),
        (
            "shared.weight",
            {"model_type": "t5", "tie_word_embeddings": False},
            "encoder.embed_tokens.weight",
        ),
        (
            "gpt_neox.embed_in.weight",
            {"model_type": "gpt_neox", "tie_word_embeddings": True},
            "lm_head.weight",  # embed_out before transformers 5
        ),
    ],
)
def test_tied_weights_are_aliases(tmp_path, stored, config, alias):
    save_file({stored: np.arange(6.0).reshape(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_checkpoint(tmp_path)
    if alias is None:
        assert not model.aliases
        with pytest.raises(CheckpointError, match=r"Missing tensor for 'lm_head\.weight'"):
            model.resolve("lm_head.weight")
        return
    assert model.aliases[alias] == stored
    assert alias in model and model.is_alias(alias) and not model.is_alias(stored)
    assert model.resolve(alias) is model.tensors[stored]
    assert model.read(alias) == model.read(stored)
    assert list(model) == [stored]  # nothing is counted twice


def test_a_stored_head_is_no_alias(tmp_path):
    tensors = {"model.embed_tokens.weight": np.ones(2), "lm_head.weight": np.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    model = open_checkpoint(tmp_path)
    assert not model.aliases and model.read("lm_head.weight") == bytes(16)

"""What a user can get wrong about an input, each with the message that says so."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint.checkpoint_files import entry, raw_file, two_shards
from magic_fast.checkpoint import open_checkpoint
from magic_fast.errors import CheckpointError

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
SHARD = "model-00002-of-00002.safetensors"


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert re.fullmatch(r".+ for .+: expected .+, got .+\. .+\.", message, re.S)
    return message


def with_index(folder, **changes):
    """Change entries of the index of a model with two shards."""
    two_shards(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].update(changes)
    index.write_text(json.dumps(content))
    return folder


def test_missing_shard(tmp_path):
    two_shards(tmp_path)
    (tmp_path / SHARD).unlink()
    message = refusal(tmp_path)
    assert message.startswith(f"Missing shard for {tmp_path / SHARD}: expected a file")
    assert "Download the missing file" in message


def test_missing_shard_without_an_index(tmp_path):
    two_shards(tmp_path)
    (tmp_path / SHARD).unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").rename(
        tmp_path / "model-00001-of-00003.safetensors"
    )
    save_file({"z": np.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    absent = tmp_path / "model-00002-of-00003.safetensors"
    assert refusal(tmp_path).startswith(f"Missing shard for {absent}: expected 3 shards, got 2")


def test_broken_link_to_a_shard(tmp_path):
    two_shards(tmp_path)
    (tmp_path / SHARD).unlink()
    (tmp_path / SHARD).symlink_to("../../blobs/gone")
    assert "got a broken link" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 40])
def test_truncated_in_the_header(tmp_path, kept):
    two_shards(tmp_path)
    os.truncate(tmp_path / SHARD, kept)
    message = refusal(tmp_path)
    assert message.startswith("Truncated") and SHARD in message


def test_truncated_in_the_data(tmp_path):
    two_shards(tmp_path)
    os.truncate(tmp_path / SHARD, (tmp_path / SHARD).stat().st_size - 1)
    message = refusal(tmp_path)
    assert message.startswith("Offsets outside the file for tensor 'c' in")
    assert SHARD in message and "truncated" in message


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (raw_file(b'{"a":' + b"x" * 50), "Corrupt header that is not valid JSON"),
        ((10**9).to_bytes(8, "little") + b"{}", "Oversized header"),
        (bytes(range(200, 232)), "Oversized header"),
        (raw_file({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "Overlapping offsets"),
        (raw_file({"a": entry(offsets=[8, 12])}, bytes(4)), "Offsets outside the file"),
        (raw_file({"a": entry()}, bytes(9)), "Trailing bytes"),
    ],
)
def test_corrupt_files(tmp_path, file, message):
    (tmp_path / "model.safetensors").write_bytes(file)
    text = refusal(tmp_path)
    assert text.startswith(message) and str(tmp_path / "model.safetensors") in text


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "..\\b", ".."]
)
def test_index_naming_a_path_outside_the_folder(tmp_path, name):
    folder = with_index(tmp_path / "m", c=name)
    save_file({"c": np.ones(1)}, tmp_path / "secret.safetensors")
    message = refusal(folder)
    assert message.startswith("Index naming a path outside the folder for tensor 'c' in")
    assert "model.safetensors.index.json" in message and "Do not trust" in message


@pytest.mark.parametrize("name", [3, None, "", "a\0b", ["x"], {}])
def test_index_naming_no_file(tmp_path, name):
    assert "Corrupt index for tensor 'c'" in refusal(with_index(tmp_path, c=name))


def test_index_naming_a_strange_file(tmp_path):
    message = refusal(with_index(tmp_path, c="\ud800" + "x" * 300))
    assert message.startswith("Missing shard")
    message.encode()


def test_index_naming_pickles(tmp_path):
    assert "Pickle checkpoint for tensor 'c'" in refusal(with_index(tmp_path, c="model.bin"))


def test_index_naming_a_tensor_the_shard_lacks(tmp_path):
    message = refusal(with_index(tmp_path, d=SHARD))
    assert message.startswith("Index naming a tensor that its shard lacks for tensor 'd' in")
    assert SHARD in message and "got no such tensor" in message
    message = refusal(with_index(tmp_path / "n", c="model-00001-of-00002.safetensors", a=SHARD))
    assert "Index naming a tensor that its shard lacks" in message and "got it in" in message


def test_tensor_in_two_shards(tmp_path):
    two_shards(tmp_path)
    save_file({"c": np.ones(1), "a": np.ones(1)}, tmp_path / SHARD)
    message = refusal(tmp_path)
    assert message.startswith("Tensor in two shards for 'a': expected one file, got ")
    assert SHARD in message and "model-00001-of-00002.safetensors" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Corrupt index that is not valid JSON"),
        ("[]", "Corrupt index that is not a JSON object"),
        ("{}", 'expected a "weight_map"'),
        ('{"weight_map": {}}', 'expected a "weight_map"'),
        ('{"weight_map": ["a"]}', 'expected a "weight_map"'),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' twice"),
        (POINTER, "got a git-lfs pointer"),
    ],
)
def test_corrupt_index(tmp_path, content, message):
    two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    text = refusal(tmp_path)
    assert message in text and "model.safetensors.index.json" in text


def test_corrupt_config(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "config.json").write_text("{'a': 1}")
    assert refusal(tmp_path).startswith(f"Corrupt config that is not valid JSON for {tmp_path}")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"]
)
def test_pickles(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / name):
        message = refusal(path)
        assert message.startswith("Pickle checkpoint for") and "convert" in message
        assert "never opened" in message and "save_pretrained" in message


def test_a_pickle_under_a_false_name(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "got a zip archive (a PyTorch pickle checkpoint)" in refusal(tmp_path)


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, length):
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + b"x")
    assert bytes(open_checkpoint(path).read("a")) == b"x"


@pytest.mark.parametrize("content", ["<!DOCTYPE html><html>", "<html><body>no</body>"])
def test_a_web_page_instead_of_weights(tmp_path, content):
    (tmp_path / "model.safetensors").write_text(content)
    assert "got a web page" in refusal(tmp_path)


def test_git_lfs_pointers(tmp_path):
    two_shards(tmp_path)
    (tmp_path / SHARD).write_text(POINTER)
    message = refusal(tmp_path)
    assert message.startswith(f"File not downloaded for {tmp_path / SHARD}")
    assert "got a git-lfs pointer" in message and "git lfs pull" in message


def test_a_folder_that_is_not_there(tmp_path):
    message = refusal(tmp_path / "no such")
    assert message.startswith(f"Model not found for {tmp_path / 'no such'}: expected an existing")
    assert "hf download" not in message


def test_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal("meta-llama/Llama-3.1-8B")
    assert "Models are read from local folders" in message
    assert "`hf download meta-llama/Llama-3.1-8B --local-dir meta-llama/Llama-3.1-8B`" in message
    (tmp_path / "meta-llama").mkdir()  # then it is a path
    assert "hf download" not in refusal("meta-llama/Llama-3.1-8B")


def test_a_folder_without_weights(tmp_path):
    assert "got an empty folder" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert "No weights" in refusal(tmp_path) and "weights.gguf" in refusal(tmp_path)


def test_ambiguous_folders(tmp_path):
    for name in ("x", "y"):
        save_file({name: np.ones(1)}, tmp_path / f"{name}.safetensors")
    message = refusal(tmp_path)
    assert message.startswith(f"Ambiguous weights for {tmp_path}") and "x.safetensors, y" in message
    two_shards(tmp_path / "m")
    save_file({"a": np.ones(1)}, tmp_path / "m" / "model.safetensors")
    assert "Ambiguous weights" in refusal(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    index = tmp_path / "m" / "model.safetensors.index.json"
    for name in ("a", "b"):
        (index.parent / f"{name}.safetensors.index.json").write_text(index.read_text())
    index.unlink()
    assert "expected one index" in refusal(tmp_path / "m")


def test_other_things(tmp_path):
    two_shards(tmp_path)
    assert "got an index" in refusal(tmp_path / "model.safetensors.index.json")
    assert "got another file" in refusal(tmp_path / "config.json")
    (tmp_path / "link").symlink_to("nowhere")
    assert "Broken link" in refusal(tmp_path / "link")
    assert "Model not found" in refusal("a\0b")


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "Missing shard" in refusal(tmp_path)
    assert "Model not found" in refusal(tmp_path / "model.safetensors")


def test_files_are_closed_after_a_refusal(tmp_path):
    two_shards(tmp_path)
    (tmp_path / SHARD).write_bytes(b"{}")
    before = set(os.listdir("/proc/self/fd"))
    refusal(tmp_path)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_folder(tmp_path):
    two_shards(tmp_path / "m")
    (tmp_path / "m").chmod(0)
    try:
        assert "Permission denied" in refusal(tmp_path / "m")
    finally:
        (tmp_path / "m").chmod(0o700)

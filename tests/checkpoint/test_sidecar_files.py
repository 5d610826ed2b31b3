"""Which small files come along, from where, and what changes in the configuration."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from magic_fast.checkpoint import (
    OutputFolder,
    TensorSpec,
    copy_sidecars,
    open_checkpoint,
    plan_shards,
    sidecar_files,
    sidecar_source,
    updated_config,
)
from magic_fast.errors import CheckpointError

TAKEN = [
    "1_Pooling/config.json",
    "LICENSE",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
]
LEFT = [
    ".gitattributes",
    ".cache/huggingface/x.json",
    "README.md",
    "data/part/1.json",
    "checkpoint-500/config.json",
    "magic_fast.json",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "original/params.json",
    "runs/events.out.tfevents.1",
    "model.safetensors.index.json",
    "optimizer.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rng_state.pth",
    "tokenizer.bin",
    "tokenizer.safetensors",
    "trainer_state.json",
    "training_args.bin",
    "vocab.safetensors",
]
CODE = ["configuration_x.py", "modeling_x.py"]


def fill(folder, names, config="{}"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config if name == "config.json" else "{}")
    return folder


def test_names(tmp_path):
    fill(tmp_path, TAKEN + LEFT + CODE)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "vocab.link").symlink_to("gone")
    assert sidecar_files(str(tmp_path)) == TAKEN


def test_what_is_not_small_stays_behind_and_is_named(tmp_path, caplog):
    fill(tmp_path, ["config.json"])
    with open(tmp_path / "corpus.txt", "wb") as file:
        file.truncate(200_000_001)
    with caplog.at_level(logging.WARNING, logger="magic_fast"):
        assert sidecar_files(str(tmp_path)) == ["config.json"]
    assert "corpus.txt stays behind: it has 200 MB" in caplog.text


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_only_where_auto_map_asks(tmp_path, where):
    fill(tmp_path, ["config.json", "tokenizer_config.json", *CODE])
    (tmp_path / where).write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    assert set(CODE) <= set(sidecar_files(str(tmp_path)))


def test_a_damaged_configuration_is_named(tmp_path):
    fill(tmp_path, ["tokenizer_config.json"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"Corrupt configuration .*tokenizer_config\.json"):
        sidecar_files(str(tmp_path))


def model(folder, config):
    fill(folder, ["config.json", "tokenizer.json", "README.md"], config)
    save_file({"w": np.ones(1, np.float32)}, folder / "model.safetensors")
    return open_checkpoint(folder)


def copied(source, out, **changes):
    with OutputFolder(out) as output:
        output.create_shards(plan_shards([TensorSpec("w", "BF16", (1,))]))
        output.write("w", b"\0\0")
        names = copy_sidecars(source, output, **changes)
        output.finalise()
    return names


def test_copy_changes_the_configuration_and_nothing_else(tmp_path):
    text = (
        '{"torch_dtype": "float32",  "num_hidden_layers": 2, "a": "\\u00fc", "z": 1, "b": Infinity}'
    )
    source = model(tmp_path / "m", text)
    assert copied(source, tmp_path / "same", dtype="F32", num_layers=2) == [
        "config.json",
        "tokenizer.json",
    ]
    assert (tmp_path / "same" / "config.json").read_text() == text
    copied(source, tmp_path / "new", dtype="BF16", num_layers=3)
    written = (tmp_path / "new" / "config.json").read_text()
    assert list(json.loads(written)) == ["torch_dtype", "num_hidden_layers", "a", "z", "b"]
    assert json.loads(written) == {
        **json.loads(text),
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 3,
    }
    assert source.config["torch_dtype"] == "float32"
    assert "model.safetensors" in {p.name for p in (tmp_path / "new").iterdir()}
    assert not (tmp_path / "new" / "README.md").exists()


def test_a_single_file_takes_or_gives_none(tmp_path):
    source = model(tmp_path / "m", "{}")
    bare = open_checkpoint(tmp_path / "m" / "model.safetensors")
    assert copied(bare, tmp_path / "o") == []
    with OutputFolder(tmp_path / "x.safetensors") as output:
        assert copy_sidecars(source, output, dtype="BF16") == []
    assert sidecar_source(bare, [bare, source]) is source
    assert sidecar_source(source, [bare]) is source
    assert sidecar_source(None, [source, bare]) is source
    assert sidecar_source(None, [bare]) is None


@pytest.mark.parametrize(
    ("config", "dtype", "layers", "expected"),
    [
        ({"dtype": "float32"}, "F16", None, {"dtype": "float16"}),
        ({"x": 1}, "F16", 3, {"x": 1}),
        ({"torch_dtype": None}, "F16", None, {"torch_dtype": None}),
        ({"n_layer": 2, "n_head": 2}, None, 5, {"n_layer": 5, "n_head": 2}),
        (
            {
                "dtype": "float32",
                "text_config": {"dtype": "float32", "num_hidden_layers": 2},
                "vision_config": {"dtype": "float32", "num_hidden_layers": 7},
                "quantization_config": {"dtype": "int8"},
            },
            "BF16",
            4,
            {
                "dtype": "bfloat16",
                "text_config": {"dtype": "bfloat16", "num_hidden_layers": 4},
                "vision_config": {"dtype": "bfloat16", "num_hidden_layers": 7},
                "quantization_config": {"dtype": "int8"},
            },
        ),
    ],
)
def test_updated_config(config, dtype, layers, expected):
    before = json.dumps(config)
    assert updated_config(config, dtype, layers) == expected
    assert json.dumps(config) == before


def test_the_package_needs_only_the_standard_library():
    code = (
        "import sys, magic_fast.checkpoint;"
        "assert not {'torch', 'numpy', 'safetensors', 'typing_extensions'} & {*sys.modules}"
    )
    path = ":".join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})

"""Merges of models whose vocabularies differ: rows per token, worked out by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import magic_fast as mf
from magic_fast.checkpoint import open_checkpoint
from magic_fast.cli import main
from magic_fast.config.chat_templates import TEMPLATES
from magic_fast.engine.sources.vocabulary import AlignedCheckpoint

EMBEDDING = "model.embed_tokens.weight"
#: Model → tokens in the order of their rows. Row i of model m is (10·m + i, −i).
TOKENS = {"a": "x y", "b": "y x only_b both", "c": "both x y extra"}
START = {"a": 0, "b": 10, "c": 20}


def write(folder: Path, name: str, *, padding: int = 0, template: str | None = None) -> None:
    tokens = TOKENS[name].split()
    rows = [[float(START[name] + i), float(-i)] for i in range(len(tokens) + padding)]
    path = folder / name
    path.mkdir(parents=True)
    tensors = {EMBEDDING: torch.tensor(rows), "model.norm.weight": torch.ones(2)}
    save_file(tensors, path / "model.safetensors")
    sizes = {"vocab_size": len(rows), "hidden_size": 2}
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": True} | sizes))
    special = {"id": 0, "content": tokens[0], "special": True, "normalized": False}
    vocab = {token: row for row, token in enumerate(tokens)}
    data = {"added_tokens": [special], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    (path / "tokenizer.json").write_text(json.dumps(data))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        settings["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "vocab.json").write_text("{}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in TOKENS:
        write(tmp_path, name, padding=1 if name == "a" else 0)
    return tmp_path


def config(folder: Path, **more: Any) -> dict[str, Any]:
    weights = {"a": 0.5, "b": 0.25, "c": 0.25}
    entries = [{"model": str(folder / n), "parameters": {"weight": w}} for n, w in weights.items()]
    base = {"base_model": str(folder / "a"), "merge_method": "linear", "dtype": "float32"}
    return base | {"models": entries} | more


def merged(folder: Path, **more: Any) -> tuple[dict[str, list[float]], list[list[float]]]:
    """Rows by token, and the rows after those of the tokens."""
    out = folder / "out"
    mf.merge_checkpoints(config(folder, **more), out)
    data = json.loads((out / "tokenizer.json").read_text())
    vocab = dict(data["model"]["vocab"]) | {t["content"]: t["id"] for t in data["added_tokens"]}
    rows = load_file(out / "model.safetensors")[EMBEDDING]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(rows)
    return {t: rows[i].tolist() for t, i in vocab.items()}, rows[max(vocab.values()) + 1 :].tolist()


def test_union(folder: Path) -> None:
    """Missing: the base's row; where that lacks it the only model's, else the average."""
    got, padding = merged(folder, tokenizer_source="union")
    assert got == {
        "x": [0.5 * 0 + 0.25 * 11 + 0.25 * 21, -0.5],
        "y": [0.5 * 1 + 0.25 * 10 + 0.25 * 22, -1.0],
        "only_b": [12.0, -2.0],
        "both": [0.5 * 16.5 + 0.25 * 13 + 0.25 * 20, 0.5 * -1.5 + 0.25 * -3],
        "extra": [23.0, -3.0],
    }
    assert padding == []
    added = json.loads((folder / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert [(t["content"], t["id"], t["special"]) for t in added] == [
        ("x", 0, True), ("only_b", 2, False), ("both", 3, True), ("extra", 4, False),
    ]  # fmt: skip
    assert not (folder / "out" / "vocab.json").exists()  # it would lack the new tokens


def test_base_and_model(folder: Path) -> None:
    got, _ = merged(folder, tokenizer_source="base")
    assert got == {"x": [8.0, -0.5], "y": [8.5, -1.0]}
    (folder / "out").rename(folder / "first")
    got, _ = merged(folder, tokenizer={"source": str(folder / "b")})
    assert list(got) == ["y", "x", "only_b", "both"]
    assert got["x"] == [8.0, -0.5]
    assert (folder / "out" / "tokenizer.json").read_bytes() == (
        folder / "b" / "tokenizer.json"
    ).read_bytes()


def test_numbers_of_tokens_follow_the_tokenizer(folder: Path) -> None:
    """Where the tokenizer is another model's, so are the ends of a text."""
    for number, name in enumerate(TOKENS):
        path = folder / name / "config.json"
        stated = {"eos_token_id": number, "pad_token_id": 10 + number}
        path.write_text(json.dumps(json.loads(path.read_text()) | stated))
        (folder / name / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [number]})
        )
    for source, number in (("base", 0), ("union", 0), (str(folder / "b"), 1)):
        out = folder / f"out-{number}-{Path(source).name}"
        mf.merge_checkpoints(config(folder, tokenizer_source=source), out)
        stated = json.loads((out / "config.json").read_text())
        assert (stated["eos_token_id"], stated["pad_token_id"]) == (number, 10 + number)
        generation = json.loads((out / "generation_config.json").read_text())
        assert generation == {"eos_token_id": [number]}


def test_tokens_and_padding(folder: Path) -> None:
    b, c = str(folder / "b"), str(folder / "c")
    tokens = {
        "x": {"source": b, "force": True},
        "only_b": {"source": {"kind": "zero"}},
        "new": {"source": {"kind": "model_token", "model": c, "token": "extra"}},
        "y": {"source": {"kind": "model_token", "model": c, "token_id": 3}, "force": True},
    }
    got, padding = merged(folder, tokenizer={"tokens": tokens, "pad_to_multiple_of": 4})
    assert got["x"] == [11.0, -1.0]
    assert got["only_b"] == [0.25 * 12, 0.25 * -2]  # b has it: zeros for the two others
    assert got["new"] == got["y"] == [23.0, -3.0]
    assert len(got) == 6
    mean = torch.tensor(list(got.values())).mean(0).tolist()
    assert padding == [pytest.approx(mean)] * 2


def test_task_vectors_of_tokens_that_only_one_model_has(folder: Path) -> None:
    """The base takes the row of that model, so that nothing moves."""
    data = config(folder, tokenizer_source="union", merge_method="task_arithmetic")
    mf.merge_checkpoints(data | {"models": data["models"][1:]}, folder / "out")
    rows = load_file(folder / "out" / "model.safetensors")[EMBEDDING]
    assert rows[2].tolist() == [12.0, -2.0]


def test_sweeps(folder: Path) -> None:
    """Every combination has the bytes of its own merge."""
    data = config(folder, tokenizer_source="union", merge_method="task_arithmetic")
    mf.sweep_checkpoints(data, folder / "sweep", {"lambda": [0.5, 1.0]})
    mf.merge_checkpoints(data | {"parameters": {"lambda": 0.5}}, folder / "out")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        made = folder / "sweep" / "lambda=0.5" / name
        assert made.read_bytes() == (folder / "out" / name).read_bytes()


@pytest.mark.parametrize("calibrate", [None, "wsc"])
def test_streamed(calibrate: str | None, tmp_path: Path) -> None:
    """Embeddings larger than a block, read in pieces: the bytes of a merge that holds them."""
    names = [f"t{i}" for i in range(3000)]
    for seed, name in enumerate("abc"):
        path = tmp_path / name
        write(tmp_path, name)
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(seed)).tolist()
        kept = [names[i] for i in order][: 3000 - 400 * seed]
        data = {"model": {"vocab": {token: row for row, token in enumerate(kept)}}}
        (path / "tokenizer.json").write_text(json.dumps(data))
        rows = torch.tensor([[int(t[1:]) % 251 + seed] * 512 for t in kept]).bfloat16()
        save_file({EMBEDDING: rows}, path / "model.safetensors")
    data = config(tmp_path, tokenizer_source="union", merge_method="task_arithmetic")
    out = {}
    for memory in (32 << 20, 512 << 20):
        out[memory] = tmp_path / str(memory)
        mf.merge_checkpoints(data, out[memory], memory=memory, calibrate=calibrate)
    files = [(path / "model.safetensors").read_bytes() for path in out.values()]
    assert files[0] == files[1]
    if calibrate is None:  # base + ¼·1 + ¼·2 where both have the token
        vocab = json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]["vocab"]
        others = [
            json.loads((tmp_path / n / "tokenizer.json").read_text())["model"]["vocab"]
            for n in "bc"
        ]
        merged = load_file(out[32 << 20] / "model.safetensors")[EMBEDDING]
        for token, row in vocab.items():
            moved = 0.25 * (token in others[0]) + 0.5 * (token in others[1])
            assert (merged[row] == int(token[1:]) % 251 + moved).all(), token


def test_command_line_and_resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = folder / "merge.yml", str(folder / "out")
    settings = mf.MergeConfig.from_dict(config(folder, tokenizer_source="union"))
    path.write_text(settings.to_yaml())
    assert main(["merge", str(path), out, "-q"]) == 0
    assert main(["merge", str(path), out, "-q", "--resume"]) == 0
    file = folder / "c" / "tokenizer.json"
    file.write_text(file.read_text().replace("extra", "other"))
    assert main(["merge", str(path), out, "-q", "--resume"]) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_pieces_and_other_processes(folder: Path) -> None:
    """Any range of bytes reads the same; a pickled opener gives the same rows."""
    models = {name: open_checkpoint(folder / name) for name in TOKENS}
    rows = [(("b", 1),), (("b", 2),), (), (("a", 0), ("c", 1)), (("c", 0),), None, None]
    aligned = AlignedCheckpoint(models["a"], rows, models)
    buffer = bytearray(aligned.resolve(EMBEDDING).nbytes)
    aligned.read_into(EMBEDDING, buffer)
    whole = bytes(buffer)
    want = torch.tensor([[11.0, -1], [12, -2], [0, 0], [10.5, -0.5], [20, 0]])
    got = torch.frombuffer(bytearray(whole), dtype=torch.float32).view(7, 2)
    assert torch.equal(got[:5], want)
    assert torch.equal(got[5:], want.double().mean(0).float().expand(2, 2))
    again = pickle.loads(pickle.dumps(aligned.opener()))()
    for start in range(0, len(whole), 4):
        for stop in range(start + 4, len(whole) + 1, 4):
            part = bytearray(stop - start)
            again.read_into(EMBEDDING, part, start, stop - start)
            assert part == whole[start:stop]
    again.close()
    aligned.close()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tokenizer": {"source": "elsewhere"}}, "tokenizer of a model that is not merged"),
        ({"tokenizer": {"tokens": {"nobody": {}}}}, "no embedding for token 'nobody'"),
        ({"tokenizer": {}, "tokenizer_source": "union"}, "two tokenizers"),
        ({"chat_template": "chatm"}, "unknown chat template"),
        ({"chat_template": "auto"}, "expected one beside some model, got none"),
    ],
    ids=["unknown model", "unknown token", "both keys", "template", "no template"],
)
def test_mistakes(folder: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(mf.MagicFastError, match=words):
        mf.merge_checkpoints(config(folder, **more), folder / "out")


def test_a_token_beyond_its_model(folder: Path) -> None:
    source = {"kind": "model_token", "model": str(folder / "b"), "token_id": 4}
    with pytest.raises(mf.ConfigError, match=r"expected row 4 in .*b, got none \(4 rows\)"):
        mf.merge_checkpoints(
            config(folder, tokenizer={"tokens": {"x": {"source": source}}}), folder / "out"
        )


def test_a_model_without_tokenizer_json(folder: Path) -> None:
    (folder / "b" / "tokenizer.json").unlink()
    with pytest.raises(mf.CheckpointError, match=r"tokenizer\.json.*save_pretrained"):
        mf.merge_checkpoints(config(folder, tokenizer_source="union"), folder / "out")


def test_chat_templates(tmp_path: Path) -> None:
    """The most common one for auto; a name; the text itself. Rendered by Jinja."""
    for name, template in {"a": "A{{ x }}", "b": "B{{ x }}", "c": "B{{ x }}"}.items():
        write(tmp_path, name, template=template)
    cases = {"auto": "B{{ x }}", "chatml": TEMPLATES["chatml"], "mine {{ y }}": "mine {{ y }}"}
    for index, (asked, want) in enumerate(cases.items()):
        out = tmp_path / f"out-{index}"
        data = config(tmp_path, chat_template=asked, tokenizer_source="union")
        mf.merge_checkpoints(data, out)
        assert (out / "chat_template.jinja").read_text() == want
        assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == want


_TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n"
         "### Response:\n"),
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
         "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
         "<|im_start|>assistant\n"),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n"
         "[|assistant|]"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]"),
    ],
)  # fmt: skip
def test_named_templates(name: str, want: str) -> None:
    jinja = pytest.importorskip("jinja2.sandbox")
    template = jinja.ImmutableSandboxedEnvironment().from_string(TEMPLATES[name])
    got = template.render(
        messages=_TURNS, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )
    assert got == want

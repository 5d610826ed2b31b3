"""Sensitivity of checkpoints on disk, the command, and what reads its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from features.families import TASKS, case
from features.test_streamed import save
from magic_fast.cli import main
from magic_fast.huggingface import models as hf_models

LINES = ["one small step", {"text": "another text that is a little longer"}, [4, 5], "the end"]


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    for name in ("base", "expert-0", "expert-1"):
        (folder / name).symlink_to(tiny_models / name)
    (folder / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES))
    (folder / "b.txt").write_text("some words\nand some more of them\n")
    return folder


def words(models: Path, out: Path, *more: str) -> list[str]:
    return [
        "sensitivity", "--base", str(models / "base"), "--experts", str(models / "expert-0"),
        str(models / "expert-1"), "--data", f"a={models / 'a.jsonl'}", "--data",
        f"b={models / 'b.txt'}", str(out), *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama_tied", torch.float32),
        ("gpt2", torch.bfloat16),
        ("vit", torch.float32),
        pytest.param("llama_tied", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_as_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    own = case(family)
    arguments = save(own, tmp_path, dtype)
    want = mf.sensitive_layers(own.base, own.experts, data=own.data)
    got = mf.sensitive_layers_of_checkpoints(arguments["base"], arguments["experts"], own.data)
    # an older layout of names on disk keeps the model's order
    assert [*got.scores.values()] == pytest.approx([*want.scores.values()], rel=1e-3, abs=1e-12)
    assert (set(got.scores) == set(want.scores)) == (family != "vit")
    given = mf.sensitive_layers_of_checkpoints(
        arguments["base"], None, own.data, merged=arguments["merged"]
    )
    assert given.samples == got.samples
    if dtype is torch.float32:
        assert given.scores == pytest.approx(got.scores, rel=1e-2, abs=1e-11)


def test_names_on_disk_in_both_spaces(tmp_path: Path) -> None:
    """The list has the checkpoint's names; where the model has others, its layers are found."""
    own = case("vit")
    arguments = save(own, tmp_path)
    found = mf.sensitive_layers_of_checkpoints(
        arguments["base"], arguments["experts"], own.data, by="module", top=4, tensors="general"
    )
    chosen = found.sensitive
    assert not set(chosen) & {n for n, _ in own.base.named_modules()}
    done = mf.calibrate_checkpoints(
        **arguments, space="dual", data=own.data, features={"sensitive": chosen, "clamp": None}
    )
    held = [x for x in done.layers if x["coefficient"] and x["applied"] == 1 < x["coefficient"]]
    free = [x for x in done.layers if x["applied"] > 1]
    assert 0 < len(held) <= 4 and len(free) > 4


def test_names_that_transformers_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All models whole, by transformers, where its names are not the checkpoint's."""
    own = case("llama")
    arguments = save(own, tmp_path)
    found = hf_models.stored_names
    plain = mf.sensitive_layers_of_checkpoints(arguments["base"], arguments["experts"], own.data)

    def other(*given: Any) -> Any:
        names, _ = found(*given)
        return names, ["lm_head.weight"]

    monkeypatch.setattr(hf_models, "stored_names", other)
    whole = mf.sensitive_layers_of_checkpoints(arguments["base"], arguments["experts"], own.data)
    assert whole.scores == pytest.approx(plain.scores, rel=1e-3, abs=1e-12)
    assert "all models were held in memory whole" in whole.warnings[0]


@pytest.mark.parametrize("space", ["weight", "feature", "dual"])
def test_calibration_reads_the_file(
    space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From samples to a calibrated model by two commands."""
    own = case("llama")
    arguments = save(own, tmp_path)
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps(row.tolist()) + "\n" for row in own.data["first"][0]["input_ids"])
    )
    experts = [str(e) for e in arguments["experts"]]
    data = ["--data", f"first={tmp_path / 'x.jsonl'}", "--data", f"second={tmp_path / 'x.jsonl'}"]
    models = ["--base", str(arguments["base"]), "--experts", *experts]
    file = str(tmp_path / "sensitive.json")
    assert main(["sensitivity", *models, *data, file, "--top", "3", "--by", "module"]) == 0
    chosen = json.loads(Path(file).read_text())["sensitive"]
    assert len(chosen) == 3
    capsys.readouterr()
    command = ["calibrate", *models, "--merged", str(arguments["merged"]), "--sensitive", file]
    command += ["--space", space, *(data if space != "weight" else []), "--clamp", "none"]
    assert main([*command, str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    layers = [x for x in told["layers"] if x["name"] in chosen]
    assert all(x["applied"] <= 1 for x in layers) and bool(layers) == (space != "weight")
    if space != "feature":
        rows = [t for t in told["tensors"] if t["calibrated"]]
        assert rows


def test_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"
    assert main(words(models, out, "--top", "4")) == 0
    told = capsys.readouterr()
    assert "The 4 most sensitive of 21 tensors enlarged by 1.1, on 6 samples" in told.out
    found = json.loads(out.read_text())
    assert found["samples"] == 6 and found["top"] == 4 and len(found["scores"]) == 21
    assert ("noise" in told.err) == bool(found["warnings"])
    want = mf.sensitive_layers_of_checkpoints(
        models / "base",
        [models / "expert-0", models / "expert-1"],
        {"a": models / "a.jsonl", "b": models / "b.txt"},
        batch_size=2,
    )
    assert want.scores == pytest.approx(found["scores"], rel=1e-3, abs=1e-13)
    assert main(words(models, out)) == 2
    assert "expected none of that name, got one" in capsys.readouterr().err
    one = ["--tensors", "lm_head.weight", "model.norm.weight", "--samples", "1"]
    assert main(words(models, tmp_path / "t.json", *one, "--progress", "json", "--json")) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["scores"].keys() == {"lm_head.weight", "model.norm.weight"}
    lines = [json.loads(x) for x in told.err.splitlines() if x.startswith("{")]
    assert lines[-1]["done"] == lines[-1]["total"] == 4 and lines[-1]["name"] == "lm_head.weight"


def test_yaml_reads_the_file(models: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    report = mf.SensitivityReport(dict.fromkeys(names, 0.5), "kl", 1.1, "tensor", 1, None, 0.0)
    report.save(tmp_path / "s.json")

    def merged(sensitive: Any, out: str) -> dict[str, Any]:
        config = {
            "merge_method": "average", "base_model": str(models / "base"),
            "models": [{"model": str(models / f"expert-{k}")} for k in (0, 1)],
            "calibrate": {"sensitive": sensitive},
        }  # fmt: skip
        mf.merge_checkpoints(config, tmp_path / out)
        return {f.name: f.read_bytes() for f in (tmp_path / out).glob("*.safetensors")}

    one = merged(str(tmp_path / "s.json"), "one")  # the file's own top, not ten
    assert one == merged(names[:1], "two")
    assert one != merged({"path": str(tmp_path / "s.json"), "top": 2}, "three")


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown_tensor": (
        ["--tensors", "lm_head", "model.norm.weight"],
        "tensors: expected names of the model's tensors, got 'lm_head', which it does not have. "
        "Check the list against the model's names.",
    ),
    "rule_and_name": (
        ["--tensors", "general", "model.norm.weight"],
        "--tensors general: expected it alone, got names beside it.",
    ),
    "factor": (
        ["--perturbation", "1"],
        "perturbation: expected a factor other than 1, which changes nothing.",
    ),
    "both": (
        ["--merged", "{models}/base"],
        "experts, merged: expected one of them, got both. Experts are averaged; a merged model is "
        "taken as it is.",
    ),
    "task_twice": (
        ["--data", "a={models}/b.txt"],
        "--data a: expected each task once, got it twice.",
    ),
    "empty": (
        ["--data", "c={models}/empty.txt"],
        "data of task 'c': expected at least one sample in '{models}/empty.txt', got none.",
    ),
    "images": (
        ["--data", "c={models}/images.jsonl"],
        "data of task 'c': expected text or token ids, which the model takes, got images.",
    ),
    "no_file": (
        ["--data", "c={models}/absent.txt"],
        "data of task 'c': expected a file that can be read, got [Errno 2] No such file or "
        "directory: '{models}/absent.txt'.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(
    name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "empty.txt").write_text("\n")
    (models / "images.jsonl").write_text('{"image": "x.png"}\n')
    more, message = ([w.replace("{models}", str(models)) for w in x] for x in
                     (MISTAKES[name][0], [MISTAKES[name][1]]))  # fmt: skip
    assert main(words(models, tmp_path / "out.json", *more)) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == f"magic-fast: error: {message[0]}"
    assert not (tmp_path / "out.json").exists()


def test_more_mistakes(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = case("llama")
    arguments = save(own, tmp_path)  # without a tokenizer
    experts = [str(e) for e in arguments["experts"]]
    command = ["sensitivity", "--base", str(arguments["base"]), "--experts", *experts]
    data = ["--data", f"{TASKS[0]}={models / 'b.txt'}"]
    assert main([*command, *data, str(tmp_path / "o.json")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: tokenizer for the data of task 'first': expected its files", error)
    assert "Traceback" not in error
    assert main([*command, "--perturbation", "2", str(tmp_path / "o.json")]) == 2
    assert "data: expected samples of at least one task, got none." in capsys.readouterr().err
    bare = ["sensitivity", "--base", str(arguments["base"]), *data, str(tmp_path / "o.json")]
    assert main(bare) == 2
    assert "experts, merged: expected one of them, got neither." in capsys.readouterr().err

"""Samples from files, by the command line; and what it says of bad ones."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from features.families import case
from features.test_streamed import save
from magic_fast.cli import main
from magic_fast.errors import InputError
from magic_fast.huggingface import models as hf_models
from magic_fast.huggingface.data import Sampling, read_batches

TEXTS = ["one small step", "another text that is a little longer than the first", "the end"]


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, expert-0, expert-1, merged, and files of samples beside them."""
    folder = tmp_path_factory.mktemp("features")
    for name in ("base", "expert-0", "expert-1"):
        (folder / name).symlink_to(tiny_models / name)
    config = {
        "merge_method": "average",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"expert-{k}")} for k in (0, 1)],
    }
    mf.merge_checkpoints(config, folder / "merged")
    lines = [{"text": TEXTS[0]}, TEXTS[1], {"input_ids": [1, 2, 3]}, [4, 5]]
    (folder / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "b.txt").write_text("\n".join(TEXTS) + "\n\n")
    return folder


def words(models: Path, out: Path, *more: str, tasks: tuple[str, str] = ("x", "y")) -> list[str]:
    first, second = f"{tasks[0]}={models / 'a.jsonl'}", f"{tasks[1]}={models / 'b.txt'}"
    return [
        "calibrate", "--base", str(models / "base"), "--experts", str(models / "expert-0"),
        str(models / "expert-1"), "--merged", str(models / "merged"), str(out),
        "--data", first, "--data", second, *more,
    ]  # fmt: skip


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("space", ["feature", "dual"])
def test_command(
    space: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(models, tmp_path / "out", "--space", space)) == 0
    text = capsys.readouterr().out
    assert "Calibrated the task features of 21 layers" in text
    assert ("rows of" in text) == (space == "dual")
    assert mf.verify_checkpoint(tmp_path / "out").ok
    record = json.loads((tmp_path / "out/magic_fast.json").read_text())
    assert "a.jsonl" in record["recipe"] and record["settings"]["sampling"]["samples"] == 64


def test_command_is_the_call(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padding does not count, so that batches of any size give the same."""
    arguments = ("--space", "feature", "--json", "--norm", "2", "--sequential", "--clamp", "none")
    assert main(words(models, tmp_path / "one", *arguments)) == 0
    one = report_of(capsys)["layers"]
    assert main(words(models, tmp_path / "two", *arguments, "--batch-size", "1")) == 0
    two = report_of(capsys)["layers"]
    tokenizer = hf_models.library().AutoTokenizer.from_pretrained(str(models / "merged"))
    ids = [tokenizer(t)["input_ids"] for t in TEXTS]
    data = {
        "x": [torch.tensor([i]) for i in (ids[0], ids[1], [1, 2, 3], [4, 5])],
        "y": [torch.tensor([i]) for i in ids],
    }
    done = mf.calibrate_checkpoints(
        models / "base", [models / "expert-0", models / "expert-1"], models / "merged",
        tmp_path / "three", space="feature", data=data,
        features={"p": 2, "sequential": True, "clamp": None},
    )  # fmt: skip
    for rows in zip(one, two, done.layers, strict=True):
        assert len({r["positions"] for r in rows}) == 1
        values = [r["applied"] for r in rows]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_tasks_by_name(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for out, tasks in (("a", ("x", "y")), ("b", ("expert-0", "expert-1"))):
        assert main(words(models, tmp_path / out, "--space=feature", "--json", tasks=tasks)) == 0
        rows.append([x["applied"] for x in report_of(capsys)["layers"]])
    assert rows[0] == rows[1]
    swapped = words(
        models, tmp_path / "c", "--space=feature", "--json", tasks=("expert-1", "expert-0")
    )
    assert main(swapped) == 0
    assert [x["applied"] for x in report_of(capsys)["layers"]] != rows[0]


def test_limits(models: Path) -> None:
    with mf_open(models / "merged") as merged:
        model = hf_models.build_structure(merged)
    batches = read_batches(
        models / "a.jsonl", "x", model, str(models / "merged"), Sampling(3, 2, 2)
    )
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 2), (1, 2)]


def mf_open(path: Path) -> Any:
    from magic_fast.checkpoint import open_checkpoint

    return open_checkpoint(path)


MISTAKES: dict[str, tuple[dict[str, str], list[str], str]] = {
    "no_data_for_a_task": (
        {"y.txt": "\n"}, ["x=a.jsonl", "y=y.txt"],
        "data of task 'y': expected at least one sample in 'y.txt', got none.",
    ),
    "fewer_tasks": (
        {}, ["x=a.jsonl"],
        "data: expected one task for each of 2 experts, got 1 (x). Tasks and experts go together "
        "in order, or by name where experts is a mapping.",
    ),
    "some_names": (
        {}, ["expert-0=a.jsonl", "y=b.txt"],
        "data of task 'expert-1': expected samples for every expert, got none. The tasks with "
        "data: expert-0, y.",
    ),
    "same_task": (
        {}, ["x=a.jsonl", "x=b.txt"], "--data x: expected each task once, got it twice.",
    ),
    "no_file": (
        {}, ["x=a.jsonl", "y=c.jsonl"],
        "data of task 'y': expected a file that can be read, got [Errno 2] No such file or "
        "directory: 'c.jsonl'.",
    ),
    "kind_of_file": (
        {}, ["x=a.jsonl", "y=c.csv"],
        "data of task 'y': expected a .jsonl, a .txt or a folder of images, got 'c.csv'.",
    ),
    "line": (
        {"c.jsonl": '"fine"\n{"words": 1}\n'}, ["x=a.jsonl", "y=c.jsonl"],
        "sample in line 2 of 'c.jsonl': expected a text, a list of token ids, or an object with "
        "'text', 'input_ids' or 'image', got something else.",
    ),
    "broken_line": (
        {"c.jsonl": '{"text": \n'}, ["x=a.jsonl", "y=c.jsonl"],
        "sample in line 1 of 'c.jsonl': expected a text, a list of token ids, or an object with "
        "'text', 'input_ids' or 'image', got something else.",
    ),
    "wrong_modality": (
        {"c.jsonl": '{"image": "x.png"}\n'}, ["x=a.jsonl", "y=c.jsonl"],
        "data of task 'y': expected text or token ids, which the model takes, got images.",
    ),
    "token_outside": (
        {"c.jsonl": "[99999]\n"}, ["x=a.jsonl", "y=c.jsonl"],
        "batch 0 of task 'y': expected what the model takes, got its refusal, IndexError: index "
        "out of range in self. Is the data of the right modality?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(
    name: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files, given, message = MISTAKES[name]
    for file in ("a.jsonl", "b.txt"):
        shutil.copy(models / file, tmp_path)
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    line = words(models, tmp_path / "out", "--space", "dual")
    line = [w for w in line if w != "--data" and "=" not in w]
    for task in given:
        line += ["--data", task]
    assert main(line) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"magic-fast: error: {message}"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"a.jsonl", "b.txt", *files})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "data: expected none for space 'weight', got some. Choose space 'feature' or 'dual'."),
        (
            ("--sequential",),
            "--sequential: expected it with --space 'feature' or 'dual', got --space weight. Leave "
            "it out, or choose another space.",
        ),
        (
            ("--space", "feature", "--variant", "sphere"),
            "--variant: expected it with --space 'weight' or 'dual', got --space feature. Leave it "
            "out, or choose another space.",
        ),
        (
            ("--space", "feature", "--norm", "half"),
            "calibration p: expected an integer >= 1 or 'inf', got 'half'.",
        ),
    ],
)
def test_options_that_do_nothing(
    more: tuple[str, ...],
    message: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(models, tmp_path / "out", *more)) == 2
    assert capsys.readouterr().err.strip() == f"magic-fast: error: {message}"


def test_no_data(models: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"^data: expected samples of each task for calibration in feature space, got none\.$",
    ):
        mf.calibrate_checkpoints(
            models / "base", [models / "expert-0"], models / "merged", tmp_path / "out",
            space="feature",
        )  # fmt: skip


def test_tokenizer_missing(models: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (models / "merged").iterdir():
        if "token" not in file.name:
            shutil.copy(file, bare)
    with pytest.raises(
        mf.CheckpointError,
        match=r"^tokenizer for the data of task 'x': expected its files in "
        rf"'{re.escape(str(bare))}', got .* Put them beside the weights\. Or give token ids: "
        r"'input_ids'\.$",
    ):
        mf.calibrate_checkpoints(
            models / "base", [models / "expert-0"], bare, tmp_path / "out", space="feature",
            data={"x": models / "a.jsonl"},
        )  # fmt: skip


def test_experts_of_another_architecture(models: Path, tmp_path: Path) -> None:
    own = case("llama")
    save(own, tmp_path)
    with pytest.raises(InputError, match=r"^shape of 'lm_head.weight' in .*/first: exp"):
        mf.calibrate_checkpoints(
            models / "base", [tmp_path / "first"], models / "merged", tmp_path / "out",
            space="feature", data={"first": models / "a.jsonl"},
        )  # fmt: skip
    own = case("bert")
    save(own, tmp_path)
    with pytest.raises(InputError, match=r"^Missing tensor "):
        mf.calibrate_checkpoints(
            models / "base", [tmp_path / "first"], models / "merged", tmp_path / "out",
            space="feature", data={"first": models / "a.jsonl"},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["FineModel"]}, "expected an architecture of transformers"),
        ({}, "expected a config.json with one name under 'architectures', got []"),
    ],
)
def test_architecture(config: dict[str, Any], message: str, models: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(models / "merged", odd)
    (odd / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    with pytest.raises(mf.CheckpointError, match=re.escape(message)):
        mf.calibrate_checkpoints(
            models / "base", [models / "expert-0"], odd, tmp_path / "out", space="feature",
            data={"x": models / "a.jsonl"},
        )  # fmt: skip


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        InputError,
        match=r"^package 'transformers': expected it to run models of checkpoints, got none "
        r"installed\. Install the extra: pip install 'magic_fast\[hf\]'\.$",
    ):
        hf_models.library()


def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    own = case("vit")
    arguments = save(own, tmp_path)
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (tmp_path / "merged/preprocessor_config.json").write_text(json.dumps(processor))
    generator = torch.Generator().manual_seed(0)
    for task in ("first", "second"):
        (tmp_path / f"{task}-images").mkdir()
        for n in range(3):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator).to(torch.uint8)
            image.fromarray(pixels.numpy()).save(tmp_path / f"{task}-images/{n}.png")
    data = {t: tmp_path / f"{t}-images" for t in ("first", "second")}
    done = mf.calibrate_checkpoints(**arguments, space="feature", data=data)
    assert sum(not x["note"] for x in done.layers) > 10
    files = [{"image": f"first-images/{n}.png"} for n in range(3)]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(f) + "\n" for f in files))
    again = mf.calibrate_checkpoints(
        **arguments | {"out": tmp_path / "two"}, space="feature",
        data=data | {"first": tmp_path / "first.jsonl"},
    )  # fmt: skip
    assert [x["applied"] for x in again.layers] == [x["applied"] for x in done.layers]
    (tmp_path / "first-images/9.png").write_text("no image")
    with pytest.raises(InputError, match=r"9.png' of task 'first': expected one that can be read"):
        mf.calibrate_checkpoints(
            **arguments | {"out": tmp_path / "three"}, space="feature", data=data
        )
    with pytest.raises(InputError, match="expected images, which the model takes, got text"):
        (tmp_path / "text.txt").write_text("words\n")
        mf.calibrate_checkpoints(
            **arguments | {"out": tmp_path / "three"}, space="feature",
            data=data | {"first": tmp_path / "text.txt"},
        )  # fmt: skip


def test_merged_is_the_base(models: Path, tmp_path: Path) -> None:
    """ξ is undefined: 1, and reported."""
    done = mf.calibrate_checkpoints(
        models / "base", [models / "expert-0"], models / "base", tmp_path / "out",
        space="feature", data={"x": models / "b.txt"},
    )  # fmt: skip
    assert {x["note"] for x in done.layers} == {"the merged model's features are the base's"}
    assert {x["applied"] for x in done.layers} == {1.0}

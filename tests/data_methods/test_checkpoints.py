"""The same merges of checkpoints on disk, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import magic_fast as mf
from features.families import case, case_of
from features.test_observed import mixtral, text
from features.test_streamed import assert_same, opened
from magic_fast.cli import main


def saved(models: list[nn.Module], folder: Path, dtype: torch.dtype | None = None) -> list[Path]:
    paths = []
    for k, model in enumerate(models):
        model.to(dtype).save_pretrained(folder / f"expert-{k}")
        paths.append(folder / f"expert-{k}")
    return paths


@pytest.mark.parametrize("method", ["regmean", "fisher"])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "bert", "t5", "clip"])
def test_as_in_memory(family: str, method: str, tmp_path: Path) -> None:
    own = case(family)
    want, report = mf.merge_by_data(own.experts, own.data, method, weights=(2, 1))
    paths = saved(own.experts, tmp_path)
    done = mf.merge_checkpoints_by_data(paths, tmp_path / "out", own.data, method, weights=(2, 1))
    (said,) = done.warnings
    assert said == (
        f"{report.left:.1%} of the parameters are the experts' mean: no sample tells of them"
    )
    assert_same(opened(tmp_path / "out", own.base), want, rtol=1e-4, atol=2e-5)
    record = json.loads((tmp_path / "out" / "magic_fast.json").read_text())
    assert record["settings"]["positions"] == report.positions
    assert record["settings"]["left"] == pytest.approx(report.left, abs=1e-6)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert mf.verify_checkpoint(tmp_path / "out").ok


def test_stacks_of_experts(tmp_path: Path) -> None:
    """Names that transformers converts: the models are held whole, with a warning."""
    own = case_of(mixtral, text)
    want, _ = mf.merge_by_data(own.experts, own.data)
    done = mf.merge_checkpoints_by_data(saved(own.experts, tmp_path), tmp_path / "out", own.data)
    assert len(done.warnings) == 1 or "held in memory whole" in done.warnings[0]
    assert_same(opened(tmp_path / "out", own.base), want, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    own = case("llama")
    paths = saved(own.experts, tmp_path, torch.bfloat16)
    mf.merge_checkpoints_by_data(paths, tmp_path / "out", own.data)
    want, _ = mf.merge_by_data([m.float() for m in own.experts], own.data)
    got = opened(tmp_path / "out", own.base)
    assert {p.dtype for p in got.parameters()} == {torch.bfloat16}
    for name, p in got.named_parameters():
        torch.testing.assert_close(p.float(), want.get_parameter(name), rtol=8e-3, atol=1e-4)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"experts": []}, "experts: expected at least one checkpoint, got none."),
    "theirs": (
        {"method": "fisher", "preset": "fusion_bench"},
        "preset 'fusion_bench' for method 'fisher': expected None for checkpoints, because it "
        "takes gradients. Merge modules: mf.merge_by_data.",
    ),
    "task": (
        {"data": {"x": [torch.tensor([[1, 2]])]}},
        "data: expected one task for each of 2 experts, got 1 (x). Tasks and experts go together "
        "in order, or by name where experts is a mapping.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str, tmp_path: Path) -> None:
    own = case("llama", batches=1)
    arguments, message = MISTAKES[name]
    given = {"experts": saved(own.experts, tmp_path), "data": own.data} | arguments
    with pytest.raises(mf.InputError) as error:
        mf.merge_checkpoints_by_data(out=tmp_path / "out", **given)
    assert str(error.value) == message
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.sums").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = case("gpt2")
    paths = saved(own.experts, tmp_path)
    for task in ("x", "y"):
        rows = [{"input_ids": list(range(3, 9 + n))} for n in range(4)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        "merge-by-data", "--experts", *map(str, paths), "--off-diagonal",
        "0.5", "--data", f"x={tmp_path / 'x.jsonl'}", "--data", f"y={tmp_path / 'y.jsonl'}",
        str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(words) == 0
    assert "of the parameters are the experts' mean" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "magic_fast.json").read_text())
    assert record["settings"]["off_diagonal"] == 0.5 and record["method"] == "regmean"
    words[-1] = str(tmp_path / "other")
    assert main([*words, "--method", "fisher"]) == 2
    assert "off_diagonal for method 'fisher': expected none, got 0.5." in capsys.readouterr().err

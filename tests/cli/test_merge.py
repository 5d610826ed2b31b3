"""``magic-fast merge``, ``calibrate`` and ``inspect`` on tiny checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import magic_fast as mf
from magic_fast.cli import main

Capture = pytest.CaptureFixture[str]


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def write_config(folder: Path, checkpoints: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(checkpoints / "base"),
        "models": [{"model": str(checkpoints / f"expert-{k}")} for k in range(3)],
        "parameters": {"density": 0.2},
        "dtype": "bfloat16",
        "calibrate": "wsc",
    }
    path = folder / "merge.yml"
    kept = {key: value for key, value in (settings | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(kept))
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_models: Path) -> Path:
    return write_config(tmp_path, tiny_models)


def in_memory(models: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    """The same merge by ``mf.merge``."""
    experts = [load(models / f"expert-{k}") for k in range(3)]
    settings: dict[str, Any] = {"density": 0.2, "calibrate": "wsc", "preset": "mergekit"}
    merged: dict[str, torch.Tensor] = mf.merge(
        load(models / "base"), experts, "ties", **settings | arguments
    )
    return merged


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def test_merge_writes_what_the_api_computes(
    config: Path, tiny_models: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out), "--max-shard-size", "200KB"]) == 0
    assert_same(load(out), in_memory(tiny_models))
    for file in ("config.json", "tokenizer.json", "README.md", "magic_fast.json"):
        assert (out / file).is_file(), file
    assert len(list(out.glob("*.safetensors"))) > 1
    assert {path.name for path in tmp_path.iterdir()} == {"out", "merge.yml"}
    printed = capsys.readouterr().out
    assert printed.startswith(f"Wrote {out}: 21 tensors by ties on backend ")
    assert "Largest deviations in magnitude (10 of " in printed


def test_quiet_says_nothing(config: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["merge", str(config), str(tmp_path / "out"), "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_json_report(config: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["merge", str(config), str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "ties"
    assert len(told["tensors"]) == 21
    calibrated = [tensor for tensor in told["tensors"] if tensor["calibrated"]]
    assert all(0.1 <= tensor["coefficient_mean"] <= 10 for tensor in calibrated)
    for tensor in calibrated:
        assert abs(tensor["magnitude_after"] - 1) < abs(tensor["magnitude_before"] - 1)


@pytest.mark.parametrize("json_too", [False, True])
def test_dry_run_writes_nothing(
    config: Path, tmp_path: Path, capsys: Capture, json_too: bool
) -> None:
    before = sorted(tmp_path.rglob("*"))
    command = ["merge", str(config), str(tmp_path / "out"), "--dry-run"]
    assert main(command + ["--json"] * json_too) == 0
    printed = capsys.readouterr().out
    if json_too:
        plan = json.loads(printed)
        assert plan["tensors"] == 21
        assert plan["output_bytes"] == 2 * 156480
        assert len(plan["inputs"]) == 4
        assert len(plan["steps"]) == 21
    else:
        assert "tensors   21 in 1 shard\n" in printed
        assert "expert-2" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_options_stand_above_the_configuration(
    config: Path, tiny_models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out), "--out-dtype", "float32", "-q"]) == 0
    assert {tensor.dtype for tensor in load(out).values()} == {torch.float32}
    other = tmp_path / "other"
    assert main(["merge", str(config), str(other), "--preset", "sd_mecha", "-q"]) == 0
    assert_same(load(other), in_memory(tiny_models, preset="sd_mecha"))


def test_calibrate_option(tiny_models: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_models, calibrate=None)
    assert main(["merge", str(config), str(tmp_path / "plain"), "-q"]) == 0
    assert_same(load(tmp_path / "plain"), in_memory(tiny_models, calibrate=None))
    assert main(["merge", str(config), str(tmp_path / "wsc"), "-q", "--calibrate", "wsc"]) == 0
    assert_same(load(tmp_path / "wsc"), in_memory(tiny_models))


def test_calibrate_a_merged_folder(tiny_models: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_models, calibrate=None)
    merged, out = tmp_path / "merged", tmp_path / "out"
    assert main(["merge", str(config), str(merged), "-q"]) == 0
    sensitive = tmp_path / "sensitive.json"
    name = "model.layers.0.mlp.up_proj.weight"
    sensitive.write_text(json.dumps([name]))
    experts = [str(tiny_models / f"expert-{k}") for k in range(3)]
    command = ["calibrate", "--base", str(tiny_models / "base"), "--experts", *experts]
    command += ["--merged", str(merged), str(out), "--variant", "sphere", "--clamp", "0.5,2"]
    assert main([*command, "--sensitive", str(sensitive), "-q"]) == 0
    wanted, _ = mf.calibrate_weights(
        load(tiny_models / "base"),
        [load(Path(expert)) for expert in experts],
        load(merged),
        calibration=mf.WeightCalibration(
            variant="sphere",  # type: ignore[arg-type]
            clamp=(0.5, 2.0),
            sensitive=(name,),
        ),
    )
    assert_same(load(out), wanted)


def test_inspect(config: Path, tiny_models: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out), "-q"]) == 0
    experts = [str(tiny_models / f"expert-{k}") for k in range(3)]
    command = ["inspect", "--base", str(tiny_models / "base"), "--experts", *experts]
    command += ["--merged", str(out), "-q"]
    assert main([*command, "--top", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Task vectors (2 of 21 tensors, the largest first)"
    assert len(printed) == 5
    assert main([*command, "--json"]) == 0
    told = {tensor["name"]: tensor for tensor in json.loads(capsys.readouterr().out)["tensors"]}
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = mf.task_vector_stats(
        load(tiny_models / "base")[name], [load(Path(e))[name] for e in experts], load(out)[name]
    )
    assert told[name]["norms"] == pytest.approx(wanted.norms, rel=1e-6)
    assert told[name]["magnitude"] == pytest.approx(wanted.magnitude, rel=1e-6)
    assert told[name]["sign_conflict"] == pytest.approx(wanted.sign_conflict, abs=1e-9)


def refused(arguments: list[str], capsys: Capture) -> str:
    """The message of a command that must fail by the user's fault."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("magic-fast: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_output_in_the_way(config: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    message = refused(["merge", str(config), str(out)], capsys)
    assert str(out) in message
    assert (out / "precious").read_text() == "mine"


def test_configuration_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    message = refused(["merge", str(tmp_path / "no.yml"), str(tmp_path / "out")], capsys)
    assert "no.yml" in message
    with_override = ["merge", str(tmp_path / "no.yml"), str(tmp_path / "out"), "--preset", "magic"]
    assert "no.yml" in refused(with_override, capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge_methd": "ties"}, ("merge_methd", "merge_method")),
        ({"merge_method": "tees"}, ("tees", "ties")),
        ({"parameters": {"density": 1.5}}, ("density", "1.5")),
        ({"parameters": {"density": 0}}, ("density", "0")),
        ({"parameters": {"density": -1}}, ("density", "-1")),
        ({"parameters": {"densty": 0.5}}, ("densty", "density")),
    ],
)
def test_wrong_configuration(
    changes: dict[str, Any],
    words: tuple[str, ...],
    tiny_models: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    config = write_config(tmp_path, tiny_models, **changes)
    message = refused(["merge", str(config), str(tmp_path / "out")], capsys)
    assert "merge.yml, line " in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault", ["missing model", "missing shard", "truncated", "shape", "tensor"]
)
def test_damaged_checkpoint(fault: str, tiny_models: Path, tmp_path: Path, capsys: Capture) -> None:
    """Named before any work: nothing is left, under whatever name."""
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    shard = models / "expert-1/model-00002-of-00003.safetensors"
    word = "expert-1"
    if fault == "missing model":
        shutil.rmtree(models / "expert-1")
    elif fault == "missing shard":
        shard.unlink()
        word = shard.name
    elif fault == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
        word = shard.name
    else:
        tensors = load_file(shard)
        word = next(iter(tensors))
        if fault == "shape":
            tensors[word] = tensors[word][:-1].clone()
        else:
            del tensors[word]
        save_file(tensors, shard, {"format": "pt"})
    config = write_config(tmp_path, models)
    assert word in refused(["merge", str(config), str(tmp_path / "out")], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "merge.yml"}


def test_pickle_checkpoint(tiny_models: Path, tmp_path: Path, capsys: Capture) -> None:
    model = tmp_path / "pickled"
    model.mkdir()
    shutil.copy(tiny_models / "base/config.json", model)
    torch.save(load(tiny_models / "expert-0"), model / "pytorch_model.bin")
    config = write_config(tmp_path, tiny_models, models=[{"model": str(model)}])
    message = refused(["merge", str(config), str(tmp_path / "out")], capsys)
    assert "pickled" in message
    assert "safetensors" in message


def test_not_a_number_names_tensor_and_expert(
    tiny_models: Path, tmp_path: Path, capsys: Capture
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    shard = models / "expert-1/model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    config = write_config(tmp_path, models)
    message = refused(["merge", str(config), str(tmp_path / "out")], capsys)
    assert name in message
    assert "expert 1" in message
    assert not (tmp_path / "out").exists()


def test_interrupted_merge_leaves_no_output(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from contextlib import contextmanager

    from magic_fast.cli import merge

    @contextmanager
    def interrupting(**settings: Any) -> Any:
        def report(state: Any) -> None:
            if state.done_bytes > 0:
                raise KeyboardInterrupt

        yield report

    monkeypatch.setattr(merge, "progress", interrupting)
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out)]) == 130
    assert capsys.readouterr().err == f"magic-fast: interrupted; {out} was not made\n"
    assert not out.exists()
    monkeypatch.undo()
    assert main(["merge", str(config), str(out), "-q"]) == 0  # nothing stands in the way

"""``magic-fast merge``, ``calibrate``, ``inspect`` and ``verify`` on tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from magic_fast.cli import main
from support.models import assert_same, in_memory, load, write_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path, tiny_models: Path) -> Path:
    return write_config(tmp_path, tiny_models)


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


def test_interrupted_merge_leaves_no_output_and_can_be_resumed(
    config: Path,
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
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
    assert capsys.readouterr().err == (
        f"magic-fast: interrupted; {out} was not made. The same command with --resume continues\n"
    )
    assert not out.exists()
    monkeypatch.undo()
    assert main(["merge", str(config), str(out), "--resume", "-q"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "merge.yml"}
    assert_same(load(out), in_memory(tiny_models))


def test_verify(config: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out), "-q"]) == 0
    assert main(["verify", str(out)]) == 0
    assert (
        f"{out}: sound (21 tensors, 313 kB, 21 checksums, config.json by" in capsys.readouterr().out
    )
    shard = next(out.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(out), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert len(told["problems"]) == 1
    assert "checksum" in told["problems"][0]

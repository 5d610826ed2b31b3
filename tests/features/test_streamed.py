"""Calibration of checkpoints, one layer's weights at a time, gives what calibration in memory
gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import magic_fast as mf
from features.families import FAMILIES, TASKS, Case, case


def save(own: Case, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The models as checkpoints; the arguments of ``calibrate_checkpoints``."""
    folder.mkdir(exist_ok=True)
    models = {"base": own.base, "merged": own.merged}
    models |= dict(zip(TASKS, own.experts, strict=True))
    for name, model in models.items():
        model.to(dtype).save_pretrained(folder / name)
    return {
        "base": folder / "base",
        "experts": [folder / t for t in TASKS],
        "merged": folder / "merged",
        "out": folder / "out",
    }


def opened(folder: Path, like: nn.Module) -> nn.Module:
    return type(like).from_pretrained(folder, dtype="auto").eval()


def assert_same(got: nn.Module, want: nn.Module, **tolerance: float) -> None:
    rows = dict(want.named_parameters())
    for name, parameter in got.named_parameters():
        torch.testing.assert_close(
            parameter, rows[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sequential": True},
        pytest.param({"granularity": "channel", "reduction": "mean"}, marks=pytest.mark.slow),
    ],
    ids=["", "sequential", "channel"],
)
def test_as_in_memory(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    own = case(family)
    arguments = save(own, tmp_path)
    want, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data, **settings)
    done = mf.calibrate_checkpoints(**arguments, space="feature", data=own.data, features=settings)
    assert not done.warnings and done.left == pytest.approx(report.left)
    for got, layer in zip(done.layers, report.layers, strict=True):
        assert got["name"] == layer.name and got["note"] == layer.note
        assert got["calls"] == layer.calls and got["positions"] == layer.positions
        # float32 activations of the same model; sums of the same numbers
        assert got["applied"] == pytest.approx(float(layer.applied.mean()), rel=1e-5)
    assert_same(opened(tmp_path / "out", own.base), want, rtol=1e-5, atol=1e-6)


def test_named_experts_and_inputs(tmp_path: Path) -> None:
    """Experts by name in an order of their own, batches as a loader yields them."""
    own = case("vit")
    arguments = save(own, tmp_path) | {"space": "feature"}
    want = mf.calibrate_checkpoints(**arguments, data=own.data)
    named = dict(zip(TASKS, arguments["experts"], strict=True))
    experts = {f"{task}-x": named[task] for task in reversed(TASKS)}
    data = {
        f"{task}-x": [(b["pixel_values"], torch.zeros(len(b["pixel_values"]))) for b in batches]
        for task, batches in own.data.items()
    }
    given = arguments | {"experts": experts, "out": tmp_path / "other"}
    done = mf.calibrate_checkpoints(**given, data=data, inputs=lambda b: {"pixel_values": b[0]})
    for got, layer in zip(done.layers, want.layers, strict=True):
        assert got["applied"] == pytest.approx(layer["applied"], rel=1e-6)
    for message, changes in (
        ("inputs: expected it with data, got it without. Leave it out.", {"space": "weight"}),
        (
            "inputs: expected it with batches, got it with files alone, whose samples are made for "
            "the model already. Leave it out.",
            {"data": dict.fromkeys(data, "samples.jsonl")},
        ),
    ):
        with pytest.raises(mf.InputError, match=f"^{message}$"):
            mf.calibrate_checkpoints(**given | changes | {"inputs": list, "out": tmp_path / "no"})


@pytest.mark.parametrize("space", ["feature", "dual"])
def test_bfloat16(space: str, tmp_path: Path) -> None:
    """Calibrated in float32, rounded once."""
    own = case("llama")
    arguments = save(own, tmp_path, torch.bfloat16)
    wide = [m.float() for m in (own.base, *own.experts, own.merged)]
    want, _ = mf.calibrate_features(wide[0], wide[1:3], wide[3], own.data, space=space)
    done = mf.calibrate_checkpoints(**arguments, space=space, data=own.data)
    got = opened(tmp_path / "out", own.base)
    assert {p.dtype for p in got.parameters()} == {torch.bfloat16}
    # one rounding to 8 bits
    assert_same(got.float(), want, rtol=2**-8, atol=1e-6)
    assert done.layers and any(t.calibrated for t in done.tensors) == (space == "dual")
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_output_is_whole(tmp_path: Path) -> None:
    own = case("gpt2")
    arguments = save(own, tmp_path)
    done = mf.calibrate_checkpoints(**arguments, space="feature", data=own.data)
    assert mf.verify_checkpoint(tmp_path / "out").ok
    record = json.loads((tmp_path / "out/magic_fast.json").read_text())
    assert record["layers"] == done.layers and record["left"] == done.left
    assert "layers were calibrated (FSC" in (tmp_path / "out/README.md").read_text()
    again = mf.calibrate_checkpoints(**arguments, space="feature", data=own.data, resume=True)
    assert (
        again.layers == done.layers
        and again.left == done.left
        and "finished already" in again.warnings[-1]
    )
    with pytest.raises(mf.InputError, match="got a finished one of another: features, the conf"):
        mf.calibrate_checkpoints(
            **arguments, space="feature", data=own.data, resume=True, features={"p": 2}
        )
    other = own.data | {"first": own.data["second"]}
    with pytest.raises(mf.InputError, match="got a finished one of another: data differ"):
        mf.calibrate_checkpoints(**arguments, space="feature", data=other, resume=True)


@pytest.mark.parametrize("space", ["feature", "dual"])
def test_interrupted_and_resumed(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from magic_fast.engine.execute import writer as stages

    own = case("llama")
    arguments = save(own, tmp_path)
    want = mf.calibrate_checkpoints(
        **arguments | {"out": tmp_path / "undisturbed"}, space=space, data=own.data
    )
    calls = {"left": 0}
    write = stages.Writer.__call__

    def stop(self: Any, unit: Any) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt
        write(self, unit)

    monkeypatch.setattr(stages.Writer, "__call__", stop)
    for left in (0, 1) if space == "dual" else (0,):
        calls["left"] = left
        with pytest.raises(KeyboardInterrupt):
            mf.calibrate_checkpoints(**arguments, space=space, data=own.data, resume=left > 0)
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    got = mf.calibrate_checkpoints(**arguments, space=space, data=own.data, resume=True)
    assert got.layers == want.layers
    for file in sorted((tmp_path / "undisturbed").glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_one_station_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never are more weights in the model than those of one station."""
    from magic_fast.calibration.features import streamed

    own = case("llama")
    arguments = save(own, tmp_path)
    held: list[int] = []
    enter = streamed.StreamedWeights.enter

    def watched(self: Any, station: Any) -> None:
        enter(self, station)
        held.append(sum(v.numel() for v in self._held.values()))

    monkeypatch.setattr(streamed.StreamedWeights, "enter", watched)
    mf.calibrate_checkpoints(**arguments, space="feature", data=own.data)
    largest = max(p.numel() for p in own.base.parameters())
    assert held and max(held) <= largest
    assert len(held) == sum(1 for m in own.base.modules() if m._parameters)  # each once


def test_weights_used_outside_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged model is held whole, with a message, where a parent uses a child's weights."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        up = nn.functional.linear(x, self.up_proj.weight)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    own = case("llama")
    arguments = save(own, tmp_path)
    want, _ = mf.calibrate_features(own.base, own.experts, own.merged, own.data)
    done = mf.calibrate_checkpoints(**arguments, space="feature", data=own.data)
    assert done.warnings == [
        "the model uses weights outside of its layers' own calls: the merged model is held in "
        "memory whole"
    ]
    assert done.left == {}
    found = next(x for x in done.layers if x["name"] == "model.layers.0.mlp.up_proj")
    assert not found["note"] and found["positions"] == 4 * 19
    assert_same(opened(tmp_path / "out", own.base), want, rtol=1e-5, atol=1e-6)


def test_names_that_transformers_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All models whole, by transformers, where its names are not the checkpoint's."""
    from magic_fast.huggingface import models as hf_models

    own = case("bert")
    arguments = save(own, tmp_path)
    found = hf_models.stored_names

    def partly(*given: Any) -> Any:
        names, _ = found(*given)
        names.pop("classifier.weight")
        return names, ["classifier.weight"]

    monkeypatch.setattr(hf_models, "stored_names", partly)
    want, _ = mf.calibrate_features(own.base, own.experts, own.merged, own.data)
    done = mf.calibrate_checkpoints(**arguments, space="feature", data=own.data)
    assert "all models are held in memory whole" in done.warnings[0]
    assert_same(opened(tmp_path / "out", own.base), want, rtol=1e-6, atol=1e-7)
    names = set(load_file(tmp_path / "merged/model.safetensors"))
    assert set(load_file(tmp_path / "out/model.safetensors")) == names
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_structure_is_built_without_weights() -> None:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    from magic_fast.huggingface.models import without_weights

    with without_weights():
        model = transformers.LlamaForCausalLM(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.buffers()} == {"cpu"}
    assert next(iter(nn.Linear(1, 1).parameters())).device.type == "cpu"


def test_absent_weights_say_so() -> None:
    """PyTorch itself gives numbers here, whatever lay in memory."""
    from magic_fast.calibration.features.streamed import Absent, AbsentError

    absent = Absent.like(torch.ones(5, 4))
    assert absent.dtype == torch.float32 and absent.shape == (5, 4) and absent.dim() == 2
    with pytest.raises(AbsentError):
        nn.functional.linear(torch.ones(3, 4), absent)
    with pytest.raises(AbsentError):
        torch.ones(5, 4) + absent

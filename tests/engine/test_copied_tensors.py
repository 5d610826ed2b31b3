"""Tensors that are not merged: integers, which must agree, and what only the base has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, Models, different, read_out, state_dict, write_model

INTEGERS = {
    "model.position_ids": torch.arange(400_000).reshape(2, -1),
    "model.mask": torch.tensor([True, False, True]),
    "model.step": torch.tensor(7, dtype=torch.int32),
}


@pytest.mark.parametrize("memory", [4 * MIB, 64 * MIB])
def test_integers_are_copied(memory: int, tmp_path: Path) -> None:
    models = Models(tmp_path / "m", {"a.weight": (4, 8)}, extra=INTEGERS)
    config = models.config("ties", parameters={"density": 0.5, "weight": 1.0}, dtype="float32")
    mf.merge_checkpoints(config, tmp_path / "out", memory=memory)
    want = models.merged("ties", dtype="float32", density=0.5, weights=1.0)
    assert different(read_out(tmp_path / "out"), want) == []


@pytest.mark.parametrize("backend", [None, "torch"])
def test_integers_that_disagree(backend: str | None, tmp_path: Path) -> None:
    """Seen in the last piece of a tensor that is read in several."""
    models = Models(tmp_path / "m", {"a.weight": (4, 8)}, extra=INTEGERS)
    other = dict(models.experts[1])
    other["model.position_ids"] = INTEGERS["model.position_ids"].clone()
    other["model.position_ids"][-1, -1] += 1
    write_model(tmp_path / "other", other)
    config = models.config("task_arithmetic", parameters={"weight": 1.0}).replace(
        str(models.folder / "expert-1"), str(tmp_path / "other")
    )
    with pytest.raises(mf.InputError) as caught:
        mf.merge_checkpoints(config, tmp_path / "out", memory=4 * MIB, backend=backend)
    assert str(caught.value) == (
        f"integer tensor 'model.position_ids' in {tmp_path / 'other'}: expected the values of "
        f"{models.folder / 'base'}, got others. Integer tensors are not merged; they must agree."
    )
    assert not (tmp_path / "out").exists()


def test_a_float_is_not_an_integer(tmp_path: Path) -> None:
    models = Models(tmp_path / "m", {"a.weight": (4, 8)})
    write_model(tmp_path / "other", {"a.weight": torch.ones(4, 8, dtype=torch.int32)})
    config = models.config("task_arithmetic", parameters={"weight": 1.0}).replace(
        str(models.folder / "expert-1"), str(tmp_path / "other")
    )
    with pytest.raises(mf.InputError, match=r"dtype of 'a.weight' in .*: expected BF16 as in"):
        mf.merge_checkpoints(config, tmp_path / "out")


def test_empty_models_of_one_scalar(tmp_path: Path) -> None:
    """Nothing but a number and a tensor without elements."""
    models = Models(tmp_path / "m", {"a": (), "b.weight": (0, 4), "c.weight": (3, 0)})
    config = models.config("ties", parameters={"density": 0.5, "weight": 1.0}, calibrate="wsc")
    mf.merge_checkpoints(config, tmp_path / "out")
    want = models.merged("ties", density=0.5, weights=1.0, calibrate="wsc")
    assert different(read_out(tmp_path / "out"), want) == []


def test_what_only_the_base_has_is_rounded(tmp_path: Path) -> None:
    """An expert of weight 0 layers: passthrough of float tensors, to the output dtype."""
    base = state_dict({"a.weight": (500, 701)}, (torch.float32,), seed=3)
    write_model(tmp_path / "base", base)
    config = f"merge_method: passthrough\nout_dtype: bfloat16\nmodels:\n- model: {tmp_path}/base\n"
    mf.merge_checkpoints(config, tmp_path / "out", memory=4 * MIB)
    want = {n: t.bfloat16() for n, t in base.items()}
    assert different(read_out(tmp_path / "out"), want) == []


RESNET = {"model_type": "resnet", "architectures": ["ResNetModel"]}
NORM = "embedder.embedder.normalization."


def test_counters_are_those_of_the_base(tmp_path: Path) -> None:
    """Fine-tunes have seen other numbers of batches than the base."""
    for k, name in enumerate(("base", "one", "two")):
        tensors = {f"{NORM}running_mean": torch.full((3,), float(k)),
                   f"{NORM}num_batches_tracked": torch.tensor(7 * k)}  # fmt: skip
        write_model(tmp_path / name, tensors, RESNET)
    config = (
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nmodels:\n"
        f"- model: {tmp_path}/one\n- model: {tmp_path}/two\nparameters: {{weight: 0.5}}\n"
    )
    mf.merge_checkpoints(config, tmp_path / "out")
    merged = read_out(tmp_path / "out")
    assert torch.equal(merged[f"{NORM}num_batches_tracked"], torch.tensor(0))
    assert torch.equal(merged[f"{NORM}running_mean"], torch.full((3,), 1.5))


@pytest.mark.parametrize("backend", [None, "torch"])
def test_buffers_that_all_have_may_be_infinite(backend: str | None, tmp_path: Path) -> None:
    """The bounds of Gemma 4's linear layers, where none was found."""
    shared = {"layers.0.feed_forward1.ffw_layer_1.input_max": torch.tensor(float("inf"))}
    models = Models(
        tmp_path / "m", {"output_proj.weight": (4, 8)}, extra=shared,
        config={"model_type": "gemma4_audio", "architectures": ["Gemma4AudioModel"]},
    )  # fmt: skip
    config = models.config("ties", parameters={"density": 0.5, "weight": 1.0})
    mf.merge_checkpoints(config, tmp_path / "out", backend=backend)
    (name,) = shared
    assert torch.equal(read_out(tmp_path / "out")[name].float(), shared[name])


def test_buffers_that_differ_may_not(tmp_path: Path) -> None:
    config = {"model_type": "gemma4_audio", "architectures": ["Gemma4AudioModel"]}
    name = "layers.0.feed_forward1.ffw_layer_1.input_max"
    for folder, bound in (("base", "inf"), ("one", "3"), ("two", "3")):
        write_model(tmp_path / folder, {name: torch.tensor(float(bound))}, config)
    text = (
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nmodels:\n"
        f"- model: {tmp_path}/one\n- model: {tmp_path}/two\nparameters: {{weight: 0.5}}\n"
    )
    with pytest.raises(mf.NonFiniteError, match="input_max"):
        mf.merge_checkpoints(text, tmp_path / "out")

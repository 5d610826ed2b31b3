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


MASK = torch.full((4, 4), float("-inf")).triu(1)


def test_counters_and_equal_buffers_are_the_first_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mask of -inf that all have is no NaN of one; counters differ in every fine-tune."""
    extra = {"model.causal_mask": MASK, "norm.num_batches_tracked": torch.tensor(3)}
    models = Models(tmp_path / "m", {"a.weight": (4, 8)}, extra=extra)
    other = dict(models.experts[1]) | {"norm.num_batches_tracked": torch.tensor(9)}
    write_model(tmp_path / "other", other)
    config = models.config("task_arithmetic", parameters={"weight": 1.0}).replace(
        str(models.folder / "expert-1"), str(tmp_path / "other")
    )
    mf.merge_checkpoints(config, tmp_path / "out")
    found = read_out(tmp_path / "out")
    assert torch.equal(found["model.causal_mask"], MASK)
    assert found["norm.num_batches_tracked"].item() == 3
    assert "1 counters differ and stay as in" in caplog.text
    write_model(tmp_path / "unlike", other | {"model.causal_mask": MASK.T.contiguous()})
    config = config.replace(str(tmp_path / "other"), str(tmp_path / "unlike"))
    with pytest.raises(mf.NonFiniteError, match="causal_mask"):
        mf.merge_checkpoints(config, tmp_path / "out2")


@pytest.mark.parametrize("suffix", ["", "/adapter_model.safetensors"])
def test_an_adapter_is_no_model(suffix: str, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}
    write_model(tmp_path / "a", factors)
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "adapter_model.safetensors")
    path = f"{tmp_path}/a{suffix}"
    config = f"merge_method: linear\nmodels:\n- {{model: {path}, parameters: {{weight: 1}}}}\n"
    with pytest.raises(mf.InputError, match=r"got an adapter.*MODEL\+ADAPTER"):
        mf.merge_checkpoints(config, tmp_path / "out")

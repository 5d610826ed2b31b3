"""Means of directions streamed through small blocks: the bits of the merge in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, Models, different, read_out
from engine.hashing import hashes
from support.backends import available_backends

pytestmark = pytest.mark.skipif(
    "native" not in available_backends(), reason="streaming in pieces needs the native backend"
)

B, H, F = torch.bfloat16, torch.float16, torch.float32
#: more than a block of 1 MiB with every dtype, rows of any length, and what is special
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (701, 1001),
    "model.layers.0.input_layernorm.weight": (77,),
    "model.layers.0.empty.weight": (0, 8),
    "model.layers.0.temperature": (),
    "model.layers.1.long.bias": (400_003,),
    "model.layers.1.mlp.conv1d.weight": (5, 181, 401),
    "model.layers.1.conv.weight": (64, 33, 5, 7),
}
METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "slerp": ("slerp", 1, {"t": 0.3}),
    "slerp_per_row": ("slerp", 1, {"t": 0.3, "per_row": True}),
    "nuslerp": ("nuslerp", 2, {"weight": 0.7}),
    "nuslerp_rows": ("nuslerp", 2, {"nuslerp_flatten": False}),
    "multislerp": ("multislerp", 3, {}),
    "karcher": ("karcher", 3, {}),
    "model_stock": ("model_stock", 3, {}),
    "model_stock_filters": ("model_stock", 3, {"filter_wise": True}),
}
MIXES = {"bf16": ((B,),) * 4, "mixed": ((F, B), (B,), (H, F), (F, H, B))}


@pytest.fixture(scope="module", params=MIXES)
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Models]:
    """By the number of experts."""
    place = tmp_path_factory.mktemp("m")
    dtypes = MIXES[request.param]
    return {k: Models(place / str(k), SHAPES, dtypes[: k + 1]) for k in (1, 2, 3)}


def options(parameters: dict[str, Any]) -> dict[str, Any]:
    return {("weights" if k == "weight" else k): v for k, v in parameters.items()}


@pytest.mark.parametrize("calibrate", [None, "wsc"])
@pytest.mark.parametrize("case", METHODS)
def test_streamed_is_in_memory(
    folders: dict[int, Models], case: str, calibrate: str | None, tmp_path: Path
) -> None:
    method, count, parameters = METHODS[case]
    models = folders[count]
    extra = {"calibrate": calibrate} if calibrate else {}
    config = models.config(method, parameters=parameters, **extra)
    want = models.merged(method, calibrate=calibrate, **options(parameters))
    for memory in (1, 64 * MIB):
        out = tmp_path / str(memory)
        plan = mf.plan_checkpoints(config, out, memory=memory)
        assert plan.budget.held == 0
        report = mf.merge_checkpoints(config, out, memory=memory)
        assert different(read_out(out), want) == []
        assert report.backend == "native"


def test_what_does_not_fit_is_read_once_more(folders: dict[int, Models], tmp_path: Path) -> None:
    """One vector a tensor: a first read for the inner products. A vector a row: none."""
    models = folders[2]
    large = [n for n in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.long.bias")]
    read = {}
    for flatten in (True, False):
        for memory in (1, 256 * MIB):
            config = models.config("nuslerp", parameters={"nuslerp_flatten": flatten})
            out = tmp_path / f"{flatten}-{memory}"
            read[flatten, memory] = mf.merge_checkpoints(config, out, memory=memory).bytes_read
    assert read[True, 256 * MIB] == read[False, 256 * MIB]
    inputs = [models.base, *models.experts]
    once_more = sum(m[n].nbytes for m in inputs for n in large)
    assert read[True, 1] - read[True, 256 * MIB] >= once_more
    assert read[False, 1] - read[False, 256 * MIB] <= sum(m[large[1]].nbytes for m in inputs)


@pytest.mark.parametrize("step", [1, 3])
def test_squares_that_float32_does_not_hold(step: int, tmp_path: Path) -> None:
    """Seen after the first read; a second one sums in float64."""
    models = Models(tmp_path / "m", {"a.weight": (701, 1001)}, ((F,),) * 3)
    for m in (models.base, *models.experts):
        m["a.weight"] *= 1e22
    for name, tensors in (("base", models.base), ("expert-0", models.experts[0]),
                          ("expert-1", models.experts[1])):  # fmt: skip
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "m" / name / "model.safetensors")
    config = models.config("nuslerp")
    mf.merge_checkpoints(config, tmp_path / "out", memory=step)
    assert different(read_out(tmp_path / "out"), models.merged("nuslerp")) == []


def test_a_sweep_of_directions(folders: dict[int, Models], tmp_path: Path) -> None:
    models = folders[1]
    config = models.config("slerp", parameters={"t": 0.5})
    mf.sweep_checkpoints(config, tmp_path / "sweep", {"t": [0.2, 0.7]}, memory=4 * MIB)
    found = sorted(p for p in (tmp_path / "sweep").iterdir() if p.is_dir())
    assert len(found) == 2
    for folder, t in zip(found, (0.2, 0.7), strict=True):
        assert different(read_out(folder), models.merged("slerp", t=t)) == []


def test_resumed(folders: dict[int, Models], tmp_path: Path) -> None:
    """On a finished output nothing is done; the bytes are those of any block size."""
    config = folders[3].config("karcher", calibrate="wsc")
    mf.merge_checkpoints(config, tmp_path / "a" / "out", memory=1)
    mf.merge_checkpoints(config, tmp_path / "a" / "out", memory=1, resume=True)
    mf.merge_checkpoints(config, tmp_path / "b" / "out")
    assert hashes(tmp_path / "a" / "out") == hashes(tmp_path / "b" / "out")

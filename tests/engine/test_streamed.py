"""A merge streamed through small blocks gives the bits of the merge with all tensors in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import magic_fast as mf
from engine.engine_models import MIB, SHAPES, Models, different, environment, read_out
from engine.hashing import hashes
from support.backends import available_backends

pytestmark = pytest.mark.skipif(
    "native" not in available_backends(), reason="streaming in pieces needs the native backend"
)

B, H, F, D = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {
    "bf16": ((B,),) * 4,
    "mixed": ((F, B), (B,), (H, F), (F, H, B)),
}
# YAML parameters; the same ones with the names that mf.merge gives them.
METHODS: dict[str, dict[str, Any]] = {
    "ties": {"weight": 0.7, "density": 0.3},
    "dare_ties": {"weight": 0.7, "density": 0.3, "rescale": "l1"},
    "dare_linear": {"weight": 0.5, "density": 0.4},
    "breadcrumbs": {"weight": 0.7, "density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"weight": 0.7, "density": 0.5, "gamma": 0.1},
    "della": {"weight": 0.7, "density": 0.5, "epsilon": 0.2},
    "della_linear": {"weight": 0.7, "density": 0.5, "epsilon": 0.2, "rescale": "l2"},
    "task_arithmetic": {"weight": 0.4},
    "pcb": {"ratio": 0.2},  # over the whole model
    "average": {},
    "linear": {"weight": 0.25},
}


def options(parameters: dict[str, Any]) -> dict[str, Any]:
    return {("weights" if k == "weight" else k): v for k, v in parameters.items()}


@pytest.fixture(scope="module", params=DTYPES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("m") / "m", SHAPES, DTYPES[request.param])


def check(models: Models, out: Path, config: str, want: dict[str, torch.Tensor], **run: Any) -> Any:
    report = mf.merge_checkpoints(config, out, **run)
    assert different(read_out(out), want) == []
    return report


@pytest.mark.parametrize("calibrate", [None, "wsc"])
@pytest.mark.parametrize("method", METHODS)
def test_streamed_is_in_memory(
    models: Models, method: str, calibrate: str | None, tmp_path: Path
) -> None:
    parameters = METHODS[method]
    if method == "linear" and calibrate:
        pytest.skip("operation linear has no base to calibrate against")
    extra = {"calibrate": calibrate} if calibrate else {}
    config = models.config(method, parameters=parameters, **extra)
    want = models.merged(method, calibrate=calibrate, **options(parameters))
    for memory in (4 * MIB, 11 * MIB + 13, 64 * MIB):
        check(models, tmp_path / str(memory), config, want, memory=memory)


def test_competition_within_each_tensor(models: Models, tmp_path: Path) -> None:
    parameters = {"ratio": 0.2, "scope": "tensor"}
    config = models.config("pcb", parameters=parameters, calibrate="wsc")
    want = models.merged("pcb", calibrate="wsc", **parameters)
    for memory in (4 * MIB, 64 * MIB):
        check(models, tmp_path / str(memory), config, want, memory=memory)


@pytest.mark.parametrize("preset", ["ties_merging", "fusion_bench"])
@pytest.mark.parametrize("calibrate", [None, "wsc"])
def test_thresholds_over_the_whole_model(
    models: Models, preset: str, calibrate: str | None, tmp_path: Path
) -> None:
    parameters = {"density": 0.2, "weight": 0.5}
    extra = {"calibrate": calibrate} if calibrate else {}
    config = models.config("ties", parameters=parameters, preset=preset, **extra)
    want = models.merged("ties", calibrate=calibrate, preset=preset, **options(parameters))
    check(models, tmp_path / "a", config, want, memory=4 * MIB)
    check(models, tmp_path / "b", config, want, memory=64 * MIB, max_shard_size=300_000)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("bfloat16", None), ("float16", "float32"), (None, "float16"), ("float32", "bfloat16")],
)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_dtypes_of_the_configuration(
    models: Models, method: str, dtype: str | None, out_dtype: str | None, tmp_path: Path
) -> None:
    """Inputs are rounded before thresholds are looked for, and the result once."""
    parameters = METHODS[method]
    fields = {k: v for k, v in (("dtype", dtype), ("out_dtype", out_dtype)) if v}
    config = models.config(method, parameters=parameters, calibrate="wsc", **fields)
    want = models.merged(method, calibrate="wsc", **fields, **options(parameters))
    check(models, tmp_path / "out", config, want, memory=4 * MIB)


@pytest.mark.parametrize(
    "calibration",
    [
        {"granularity": "tensor"},
        {"variant": "sphere", "p": 1},
        {"variant": "manifold_exact"},
        {"row_axis": 1},
    ],
    ids=str,
)
def test_calibrations(models: Models, calibration: dict[str, Any], tmp_path: Path) -> None:
    """What needs the whole tensor for one number is held; the bits are the same."""
    settings = mf.WeightCalibration(tensors="general", **calibration)
    config = models.config("ties", parameters=METHODS["ties"])
    want = models.merged("ties", calibrate=settings, **options(METHODS["ties"]))
    check(models, tmp_path / "out", config, want, memory=4 * MIB, calibrate=settings)


def test_many_experts_in_the_smallest_blocks(tmp_path: Path) -> None:
    """One block of 65 536 elements of nine float32 models is more than a block of memory."""
    shapes = {"a.weight": (301, 701), "b.bias": (70_000,)}
    models = Models(tmp_path / "m", shapes, ((F,),) * 9)
    config = models.config("ties", parameters=METHODS["ties"], calibrate="wsc")
    want = models.merged("ties", calibrate="wsc", **options(METHODS["ties"]))
    check(models, tmp_path / "out", config, want, memory=1)


def test_a_row_larger_than_a_block(tmp_path: Path) -> None:
    models = Models(tmp_path / "m", {"a.weight": (2, 300_001)})
    config = models.config("ties", parameters=METHODS["ties"], calibrate="wsc")
    want = models.merged("ties", calibrate="wsc", **options(METHODS["ties"]))
    plan = mf.plan_checkpoints(config, tmp_path / "out", memory=4 * MIB)
    assert plan.peak_memory > mf.plan_checkpoints(config, tmp_path / "out").peak_memory - 120 * MIB
    check(models, tmp_path / "out", config, want, memory=4 * MIB)


def test_rows_of_gpt2(tmp_path: Path) -> None:
    """Its linear layers are stored transposed: a row is a column."""
    name = "transformer.h.0.mlp.c_fc.weight"
    models = Models(tmp_path / "m", {name: (301, 701)}, config={"model_type": "gpt2"})
    config = models.config("task_arithmetic", parameters={"weight": 0.4}, calibrate="wsc")
    want = models.merged("task_arithmetic", weights=0.4, calibrate="wsc", row_axis=1)
    rows = models.merged("task_arithmetic", weights=0.4, calibrate="wsc", row_axis=0)
    assert different(rows, want)
    report = check(models, tmp_path / "out", config, want, memory=4 * MIB)
    assert report.tensors[0].rows == 701


@pytest.mark.parametrize(
    ("model_type", "axes"), [("mixtral", (0, 1)), ("gpt_oss", (0, 2)), ("llama4_text", (0, 2))]
)
def test_rows_of_experts(model_type: str, axes: tuple[int, ...], tmp_path: Path) -> None:
    """Stacks are [expert, out, in] or [expert, in, out]."""
    inside = "feed_forward" if model_type == "llama4_text" else "mlp"
    shapes = {f"model.layers.0.{inside}.experts.down_proj": (4, 96, 1013)}
    models = Models(tmp_path / "m", shapes, config={"model_type": model_type})
    config = models.config("task_arithmetic", parameters={"weight": 0.4}, calibrate="wsc")
    want = models.merged("task_arithmetic", weights=0.4, calibrate="wsc", row_axis=axes)
    report = check(models, tmp_path / "out", config, want, memory=4 * MIB)
    assert report.tensors[0].rows == 4 * (96 if axes == (0, 1) else 1013)


def test_double_precision_is_merged_in_torch(tmp_path: Path) -> None:
    shapes = {"a.weight": (30, 41), "b.weight": (20, 16)}
    models = Models(tmp_path / "m", shapes, ((D, F), (D, F), (F, B)))
    for method in ("ties", "task_arithmetic"):
        config = models.config(method, parameters=METHODS[method], calibrate="wsc")
        want = models.merged(method, calibrate="wsc", **options(METHODS[method]))
        check(models, tmp_path / method, config, want)


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_any_number_of_threads(models: Models, threads: str, tmp_path: Path) -> None:
    """Every file, not only the tensors, has the same bytes."""
    config = models.config("ties", parameters=METHODS["ties"], calibrate="wsc")
    (tmp_path / "m.yml").write_text(config)
    here, there = tmp_path / "here" / "out", tmp_path / "there" / "out"
    mf.merge_checkpoints(config, here, memory=64 * MIB)
    call = "import sys, magic_fast as mf; mf.merge_checkpoints(*sys.argv[1:], memory=4 << 20)"
    subprocess.run(
        [sys.executable, "-c", call, str(tmp_path / "m.yml"), str(there)],
        env=environment(MAGIC_FAST_NUM_THREADS=threads),
        check=True,
    )
    assert hashes(there) == hashes(here)


def test_any_size_of_shards(models: Models, tmp_path: Path) -> None:
    config = models.config("ties", parameters=METHODS["ties"])
    want = models.merged("ties", **options(METHODS["ties"]))
    for size in (1, 200_000, 10**9):
        check(models, tmp_path / str(size), config, want, memory=4 * MIB, max_shard_size=size)
    assert len(list((tmp_path / "1").glob("*.safetensors"))) == len(want)


def test_one_file(models: Models, tmp_path: Path) -> None:
    config = models.config("ties", parameters=METHODS["ties"])
    mf.merge_checkpoints(config, tmp_path / "out.safetensors", memory=4 * MIB)
    (tmp_path / "out").mkdir()
    (tmp_path / "out.safetensors").rename(tmp_path / "out" / "model.safetensors")
    want = models.merged("ties", **options(METHODS["ties"]))
    assert different(read_out(tmp_path / "out"), want) == []


def test_calibration_of_a_model_merged_elsewhere(models: Models, tmp_path: Path) -> None:
    config = models.config("ties", parameters=METHODS["ties"])
    mf.merge_checkpoints(config, tmp_path / "merged")
    want, _ = mf.calibrate_weights(models.base, models.experts, read_out(tmp_path / "merged"))
    experts = [models.folder / f"expert-{k}" for k in range(len(models.experts))]
    mf.calibrate_checkpoints(
        models.folder / "base", experts, tmp_path / "merged", tmp_path / "out", memory=4 * MIB
    )
    assert different(read_out(tmp_path / "out"), want) == []

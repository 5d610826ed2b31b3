"""Anonymous memory stays below a bound that no tensor, model or number of experts moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import magic_fast as mf
from engine.engine_models import MIB, environment
from magic_fast.checkpoint import TensorSpec, serialize_header
from support.backends import available_backends

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
    pytest.mark.skipif("native" not in available_backends(), reason="needs the native backend"),
]
PROGRAM = Path(__file__).with_name("measured_merge.py")
K = 3


def write_large(folder: Path, rows: int, cols: int, layers: int = 1) -> str:
    """Models of large bfloat16 tensors, written in blocks; the YAML of their TIES + WSC."""
    specs = [TensorSpec(f"layers.{i}.weight", "BF16", (rows, cols)) for i in range(layers)]
    head, _ = serialize_header(specs, "model.safetensors")
    block = rows * cols // 64
    for number in range(1 + K):
        path = folder / str(number)
        path.mkdir()
        draw = np.random.default_rng(number)
        base = np.random.default_rng(99)
        with open(path / "model.safetensors", "wb") as file:
            file.write(head)
            for _ in range(layers * 64):
                x = base.standard_normal(block, dtype=np.float32)
                if number:
                    x += draw.standard_normal(block, dtype=np.float32) / 64
                file.write((x.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (folder / "m.yml").write_text(
        f"merge_method: ties\nbase_model: {folder}/0\nmodels:\n"
        + "".join(f"- model: {folder}/{k}\n" for k in range(1, 1 + K))
        + "parameters: {density: 0.2, weight: 0.5}\ncalibrate: wsc\n"
    )
    return str(folder / "m.yml")


def peak_of(config: str, out: Path, memory: int, *, torch: bool = False) -> int:
    """The peak of a merge in a process of its own, whose large arrays are mapped one by one: glibc
    otherwise learns to take them from its heap, and how full that gets differs from run to run."""
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), config, str(out), str(memory)],
        env=environment(MALLOC_MMAP_THRESHOLD_=str(MIB)),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert torch or not found["torch"], "torch was imported by a merge that does not need it"
    print(f"peak {found['peak'] / MIB:.0f} MiB for {found['written'] / MIB:.0f} MiB written")
    return int(found["peak"])


def test_one_tensor_of_256_mb(tmp_path: Path) -> None:
    """Selection and merge both stream it: 1 GB of inputs, 32 MiB of blocks."""
    config = write_large(tmp_path, 8192, 16384)
    assert peak_of(config, tmp_path / "out", 32 * MIB) <= 32 * MIB + 70 * MIB


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Four times the layers, the same memory; the peak is above the blocks, so it was measured."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    small = peak_of(write_large(tmp_path / "a", 2048, 4096, 2), tmp_path / "out-a", 16 * MIB)
    large = peak_of(write_large(tmp_path / "b", 2048, 4096, 8), tmp_path / "out-b", 16 * MIB)
    assert 16 * MIB < large <= small + 16 * MIB


@pytest.mark.slow
def test_one_tensor_of_1500_mb(tmp_path: Path) -> None:
    """With the default blocks, below 250 MiB in all."""
    config = write_large(tmp_path, 45776, 16384)
    assert peak_of(config, tmp_path / "out", 128 * MIB) <= 250 * MIB


_SLOW = pytest.mark.slow
SPECTRAL = [
    pytest.param("tsv_m", "auto"),
    *(pytest.param(m, "auto", marks=_SLOW) for m in ("iso_c", "iso_cts", "star")),
    *(pytest.param(m, "exact", marks=_SLOW) for m in ("iso_c", "tsv_m")),
]


@pytest.mark.parametrize(("method", "svd"), SPECTRAL)
def test_decompositions_take_what_the_plan_says(method: str, svd: str, tmp_path: Path) -> None:
    """A matrix of 1600 x 1600 against one of 640 x 640, which has all libraries at work too."""
    peaks, held = [], []
    for side in (640, 1600):
        folder = tmp_path / str(side)
        folder.mkdir()
        config = Path(write_large(folder, side, side))
        choice = "{svd: exact}" if svd == "exact" else "{}"
        text = config.read_text().replace("ties", method).replace("calibrate: wsc\n", "")
        config.write_text(text.replace("{density: 0.2, weight: 0.5}", choice))
        held.append(mf.plan_checkpoints(config, folder / "no").budget.held)
        peaks.append(peak_of(str(config), folder / "out", 2048 * MIB, torch=True))
    assert 0 < peaks[1] - peaks[0] <= held[1] - held[0]

"""Twelve TIES models (3 densities × 4 scales) by one sweep, against three separate merges and the
writes of twelve models. Run: ``python benchmarks/sweep/bench.py [--folder F] [--repeats 5]``.

Interleaved, medians. ``writes`` is the time to write twelve models of that size, synced to the
disk, as the merges do; ``three merges + writes`` is the bar that the sweep must stay below.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import magic_fast as mf

DENSITIES, SCALES = [0.1, 0.2, 0.4], [0.3, 0.5, 0.8, 1.0]


def make_models(folder: Path, layers: int, rows: int, columns: int, experts: int) -> int:
    """base/ and expert-k/ in bfloat16; bytes of one."""
    draw = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(rows, columns, generator=draw) * 0.02
            for i in range(layers)}  # fmt: skip
    for name in ["base", *(f"expert-{k}" for k in range(experts))]:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        moved = {
            n: (t + (name != "base") * 4e-4 * torch.randn(rows, columns, generator=draw)).bfloat16()
            for n, t in base.items()
        }
        save_file(moved, folder / name / "model.safetensors")
    return 2 * layers * rows * columns


def write_twelve(folder: Path, nbytes: int) -> None:
    block = os.urandom(1 << 20)
    folder.mkdir()
    for n in range(len(DENSITIES) * len(SCALES)):
        with (folder / str(n)).open("wb") as file:
            for _ in range(nbytes >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=3)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        nbytes = make_models(work, arguments.layers, 1024, 4096, arguments.experts)
        config = {
            "merge_method": "ties",
            "base_model": str(work / "base"),
            "models": [{"model": str(work / f"expert-{k}")} for k in range(arguments.experts)],
            "parameters": {"density": 0.2},
        }
        out = work / "out"

        def three_merges() -> None:
            for density in DENSITIES:
                own = {**config, "parameters": {"density": density}}
                mf.merge_checkpoints(own, out / str(density))

        ways: dict[str, Callable[[], object]] = {
            "sweep of 12": lambda: mf.sweep_checkpoints(
                config, out, {"density": DENSITIES, "lambda": SCALES}
            ),
            "three merges": three_merges,
            "writes": lambda: write_twelve(out, nbytes),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
                shutil.rmtree(out)
        found = {name: statistics.median(values) for name, values in seconds.items()}
        bar = found["three merges"] + found["writes"]
        print(f"{arguments.experts} experts of {nbytes / 1e6:.0f} MB, bfloat16")
        for name, value in found.items():
            print(f"  {name:<22} {value:7.2f} s")
        print(f"  {'three merges + writes':<22} {bar:7.2f} s")
        print(f"  sweep / bar            {found['sweep of 12'] / bar:7.2f}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()

"""Adapters merged and calibrated by their factors, against the same on the changes formed whole.

    python benchmarks/adapters/bench.py [--size N] [--experts K] [--rank R] [--rounds N]
    [--markdown FILE]

K LoRA adapters of rank R on one N × N layer, float32, in memory: the part of `mf.merge_adapters`
that calculates. Both sides end at factors of rank R; the dense one forms K changes of N·N·4 bytes,
merges and calibrates them on the native backend, and takes the leading singular triples. One round
of both in turns, medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import magic_fast as mf
from magic_fast.adapters.factors import LowRank, balanced, calibrated, combined, truncated
from magic_fast.calibration import WeightCalibration
from magic_fast.recipe import RowCalibration
from magic_fast.spectral import leading

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

Case = Callable[[], LowRank]


def by_factors(
    changes: Sequence[LowRank], coefficients: Sequence[float], rank: int | None,
    rows: RowCalibration | None,
) -> LowRank:  # fmt: skip
    made = combined(changes, coefficients)
    if rank is not None:
        made = truncated(made, rank, "w")[0]
    return made if rows is None else calibrated(changes, made, rows, "w")[0]


def whole(
    changes: Sequence[LowRank], coefficients: Sequence[float], rank: int, calibrate: str | None
) -> LowRank:
    taus = [change.dense() for change in changes]
    weights = list(coefficients)
    merged = mf.merge_task_vectors(taus, "task_arithmetic", weights=weights, calibrate=calibrate)
    return balanced(*leading(merged, rank, label="w"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    size, k, rank = given.size, given.experts, given.rank
    generator = torch.Generator().manual_seed(0)
    changes = [
        LowRank(
            torch.randn(size, rank, generator=generator) / 64,
            torch.randn(rank, size, generator=generator) / 64,
        )
        for _ in range(k)
    ]
    coefficients = [1 / k] * k
    rows = WeightCalibration().resolve("w", (size, size), coefficients)
    cases: dict[str, tuple[Case, Case | None]] = {
        "sum, exact": (lambda: by_factors(changes, coefficients, None, None), None),
        "sum + WSC, exact": (lambda: by_factors(changes, coefficients, None, rows), None),
        f"sum, rank {rank}": (
            lambda: by_factors(changes, coefficients, rank, None),
            lambda: whole(changes, coefficients, rank, None),
        ),
        f"sum + WSC, rank {rank}": (
            lambda: by_factors(changes, coefficients, rank, rows),
            lambda: whole(changes, coefficients, rank, "wsc"),
        ),
    }
    lines = ["| merge | by factors, s | on whole changes, s | times |", "|---|--:|--:|--:|"]
    for name, (ours, dense) in cases.items():
        times: tuple[list[float], list[float]] = ([], [])
        ours()
        for _ in range(given.rounds):
            for case, kept in zip((ours, dense), times, strict=True):
                if case is not None:
                    start = time.perf_counter()
                    case()
                    kept.append(time.perf_counter() - start)
        one = statistics.median(times[0])
        other = statistics.median(times[1]) if times[1] else None
        rest = "| |" if other is None else f"{other:.3f} | {other / one:.1f} |"
        lines.append(f"| {name} | {one:.4f} | {rest}")
        print(lines[-1], flush=True)
    head = [
        "# Adapters by their factors",
        machine.line(machine.facts("torch") | {"threads": str(torch.get_num_threads())}),
        f"K = {k} LoRA adapters of rank {rank} on one {size} × {size} layer, float32; medians of "
        f"{given.rounds} interleaved rounds. The dense side's WSC comes before its truncation.",
    ]
    if given.markdown:
        given.markdown.write_text("\n\n".join([*head, "\n".join(lines)]) + "\n")


if __name__ == "__main__":
    main()

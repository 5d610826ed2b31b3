"""Means of directions on the native CPU backend against the memory's speed: two reads of the inputs
and one write, by the byte model (2·inputs + 1)·N·e, as a share of a copy's bandwidth (one read, one
write, no arithmetic) of the same rounds.

    python benchmarks/cpu/directions.py [--rows N] [--cols N] [--rounds N] [--json FILE]
                                        [--markdown FILE]

Everything of one dtype and K runs interleaved on the same tensors, medians are shown; `out` exists
and was touched before. Each call is a whole `mf.merge`: checks, both passes, the coefficients.
Before anything is timed, each result is checked against PyTorch on a part of the rows. `x torch`:
how many times as long PyTorch takes for the same call, once after a warm-up on a part. `merge`: the
same data merged by a plain sum, one read and one write, in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import data, extra_memory, measure, yardstick
from torch import Tensor

import magic_fast as mf
from magic_fast import _native

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import machine

#: label → (method, parameters)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "slerp": ("slerp", {"t": 0.3}),
    "slerp, per row": ("slerp", {"t": 0.3, "per_row": True}),
    "nuslerp": ("nuslerp", {"weights": [0.7, 0.5]}),
    "nuslerp, per row": ("nuslerp", {"nuslerp_flatten": False}),
    "multislerp": ("multislerp", {}),
    "multislerp + WSC": ("multislerp", {"calibrate": "wsc"}),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "model_stock, filter-wise": ("model_stock", {"filter_wise": True}),
}
COUNTS = {"slerp": (1,), "nuslerp": (2,)}


@dataclass
class Row:
    """One line of the table. ``streams``: how often N elements move, by the byte model."""

    label: str
    k: int
    streams: int
    run: Callable[[], object]
    in_torch: Callable[[], object] | None


def merging(
    label: str, base: Tensor, experts: list[Tensor], out: Tensor, backend: str
) -> Callable[[], object]:
    method, settings = METHODS[label]
    return lambda: mf.merge(base, experts, method, out=out, backend=backend, **settings)


def check(label: str, base: Tensor, experts: list[Tensor]) -> None:
    """Native against PyTorch on the first rows."""
    part = [x[:64] for x in (base, *experts)]
    got, want = (torch.empty_like(part[0]) for _ in range(2))
    merging(label, part[0], part[1:], got, "native")()
    merging(label, part[0], part[1:], want, "torch")()
    # one step of the dtype is all that two float32 computations may differ by
    step = 2**-7 if base.dtype == torch.bfloat16 else 1e-5
    wrong = ~torch.isclose(got.float(), want.float(), rtol=step, atol=1e-7)
    assert not wrong.any(), f"{label}: {int(wrong.sum())} elements differ from PyTorch"


def rows_of(k: int, base: Tensor, experts: list[Tensor], out: Tensor) -> list[Row]:
    found = []
    for label, (method, _) in METHODS.items():
        if k not in COUNTS.get(method, (3, 8)):
            continue
        check(label, base, experts)
        found.append(
            Row(
                label,
                k,
                2 * (k + 1) + 1,
                merging(label, base, experts, out, "native"),
                merging(label, base, experts, torch.empty_like(out), "torch"),
            )
        )
    weights = [1.0 / k] * k
    plain: Callable[[], object] = lambda: mf.merge(  # noqa: E731
        base, experts, "task_arithmetic", weights=weights, out=out, backend="native"
    )
    found.append(Row("- merge, one read", k, k + 2, plain, None))
    return found


def once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 3, 8])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    threads = _native.num_threads()
    facts = machine.facts("torch") | {"isa": _native.isa(), "threads": str(threads)}
    elements = options.rows * options.cols
    results: list[dict[str, object]] = []
    lines: list[str] = []
    for dtype in (torch.bfloat16, torch.float32):
        word, size = str(dtype).removeprefix("torch."), dtype.itemsize
        for k in options.experts:
            base, experts = (x for x in data(k, options.rows, options.cols))
            base, experts = base.to(dtype), [e.to(dtype) for e in experts]
            out = torch.zeros_like(base)
            halves = [x.view(torch.bfloat16) for x in (base, *experts, out)]  # as 16-bit values
            copy = yardstick(halves[:1], halves[-1], threads)
            stream = yardstick(halves[:-1], halves[-1], threads)
            found = rows_of(k, base, experts, out)
            seconds = measure([copy, stream, *[r.run for r in found]], options.rounds)
            ceiling = 2 * elements * size / seconds[0] / 1e9
            shaped = (k + 2) * elements * size / seconds[1] / 1e9
            lines += [
                "",
                f"{word}, K = {k}; copy {ceiling:.1f} GB/s, merge-shaped stream {shaped:.1f} GB/s",
                "",
                "| work | ms | MB | GB/s | share of copy | of stream | x torch | extra MiB |",
                "|---|--:|--:|--:|--:|--:|--:|--:|",
            ]
            for row, t in zip(found, seconds[2:], strict=True):
                moved = row.streams * elements * size
                rate, extra = moved / t / 1e9, extra_memory(row.run)
                slower = "" if row.in_torch is None else f"{once(row.in_torch) / t:.0f}"
                lines.append(
                    f"| {row.label} | {t * 1e3:.2f} | {moved / 1e6:.0f} | {rate:.2f} "
                    f"| {rate / ceiling:.0%} | {rate / shaped:.0%} | {slower} | {extra:.1f} |"
                )
                results.append(
                    {"name": row.label, "dtype": word, "k": k, "seconds": t, "bytes": moved}
                    | {"GBps": rate, "copy_GBps": ceiling, "share": rate / ceiling}
                    | {"merge_shaped_GBps": shaped, "times_torch": slower, "extra_MiB": extra}
                )
            print("\n".join(lines[-len(found) - 5 :]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": results}, indent=1) + "\n")
    if options.markdown:
        head = [
            "# Means of directions on the native CPU backend against a copy",
            "",
            "`python benchmarks/cpu/directions.py " + " ".join(sys.argv[1:]) + "`",
            "",
            machine.line(facts),
            "",
            f"{options.rows} x {options.cols}, medians of {options.rounds} interleaved rounds; "
            "bytes (2·inputs + 1)·N·e, inputs = K + 1; share: of a copy's bandwidth, and of a "
            "stream of K + 1 reads and a write, in the same rounds.",
        ]
        options.markdown.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()

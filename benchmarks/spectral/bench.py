"""Spectral methods by matrix products against the same formulas by ``torch.linalg.svd``.

    python benchmarks/spectral/bench.py --shape 4096 4096 --experts 8 --method iso_c

Both run in float32 on the same task vectors, in turns; medians. The answers are compared on the
way (relative Frobenius distance). ``--spectrum``: ``decay`` is what fine-tuning leaves (strong
directions over a long tail, weights 1/√i, in a random position per expert); ``flat`` is Gaussian
noise, the hardest case for truncation, since no gap separates one direction from the next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from magic_fast.reference import spectral
from magic_fast.reference.spectral import ExactFactorizations, Factorizations
from magic_fast.spectral import FastFactorizations

METHODS: dict[str, Callable[[list[Tensor], Factorizations], Tensor]] = {
    "iso_c": spectral.iso_c,
    "iso_cts": lambda taus, by: spectral.iso_cts(taus, 0.8, by),
    "tsv_m": spectral.tsv_m,
    "polar": lambda taus, by: by.polar(taus[0]),
}


def task_vectors(shape: tuple[int, int], k: int, spectrum: str, device: str) -> list[Tensor]:
    """K task vectors of float32."""
    generator = torch.Generator().manual_seed(0)
    taus = []
    for _ in range(k):
        x = torch.randn(shape, generator=generator)
        if spectrum == "decay":  # Gaussian factors: no decomposition needed to build it
            n = min(shape)
            weights = torch.arange(1, n + 1).rsqrt()
            left = torch.randn(shape[0], n, generator=generator) / shape[0] ** 0.5
            x = (left * weights) @ (torch.randn(n, shape[1], generator=generator))
        taus.append((x * 1e-3).to(device))
    return taus


def seconds(run: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--method", choices=sorted(METHODS), nargs="+", default=["iso_c"])
    parser.add_argument("--spectrum", choices=("decay", "flat"), default="decay")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="append one line per method to this file")
    options = parser.parse_args()
    shape, k = tuple(options.shape), options.experts
    taus = task_vectors(shape, k, options.spectrum, options.device)
    variants: dict[str, Factorizations] = {
        "products": FastFactorizations(),
        "svd": ExactFactorizations(),
    }
    warm = [tau[:96, :96].clone() for tau in taus]
    for method in options.method:
        formula = METHODS[method]
        times: dict[str, list[float]] = {name: [] for name in variants}
        results: dict[str, Tensor] = {}
        for by in variants.values():
            formula(warm, by)
        for _ in range(options.rounds):
            for name, by in variants.items():
                run = partial(formula, taus, by)
                took, results[name] = seconds(run, options.device)
                times[name].append(took)
        median = {name: statistics.median(t) for name, t in times.items()}
        exact = results["svd"].double()
        error = float((results["products"].double() - exact).norm() / exact.norm())
        row = {
            "method": method, "shape": shape, "experts": k, "spectrum": options.spectrum,
            "products_s": round(median["products"], 3), "svd_s": round(median["svd"], 3),
            "speedup": round(median["svd"] / median["products"], 2), "distance": error,
            "rounds": options.rounds, "device": options.device, "torch": torch.__version__,
            "threads": torch.get_num_threads(), "cpu": platform.machine(),
            "load": round(os.getloadavg()[0], 1),
        }  # fmt: skip
        print(
            f"{method:8} {shape[0]}x{shape[1]} K={k} {options.spectrum:5}  "
            f"products {row['products_s']:8.2f} s  svd {row['svd_s']:8.2f} s  "
            f"{row['speedup']:5.2f}x  distance {error:.1e}  (load {row['load']})",
            flush=True,
        )
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

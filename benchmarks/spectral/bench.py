"""Spectral methods by matrix products against the same formulas by ``torch.linalg.svd``.

    python benchmarks/spectral/bench.py [--shapes 4096x4096 768x3072] [--methods iso_c tsv_m]
                                        [--experts 8] [--rounds 3] [--device cuda]
                                        [--json FILE] [--markdown FILE] [--add]

Both run in float32 on the same task vectors, in turns; medians. Both answers are compared with
the formula in float64 by SVD (relative Frobenius distance; ``--no-reference``: with each other).
``--spectrum``: ``decay`` is what fine-tuning leaves (strong directions over a long tail, weights
1/√i, in a random position per expert); ``flat`` is Gaussian noise, the hardest case for truncation,
since no gap separates one direction from the next. The files are written after each row, so that a
run that is cut off leaves what it had; ``--add`` keeps the rows that FILE of an earlier run on the
same machine holds, but for those measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

from magic_fast.reference import spectral
from magic_fast.reference.spectral import ExactFactorizations, Factorizations
from magic_fast.spectral import FastFactorizations

METHODS: dict[str, Callable[[list[Tensor], Factorizations], Tensor]] = {
    "iso_c": spectral.iso_c,
    "iso_cts": lambda taus, by: spectral.iso_cts(taus, 0.8, by),
    "tsv_m": spectral.tsv_m,
    "polar": lambda taus, by: by.polar(taus[0]),
}
#: times as fast as by SVD that is aimed at: (CPU, GPU), of squares; others: not slower
AIMS = {"iso_c": (2.0, 25.0), "iso_cts": (1.5, 8.0), "tsv_m": (2.0, 10.0)}
Shape = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """Medians in seconds; ``distance`` of the answer by products and ``svd_distance`` of the one by
    SVD from the formula in float64, relative; without a reference the former is from the latter."""

    method: str
    shape: Shape
    experts: int
    spectrum: str
    products: float
    svd: float
    distance: float
    svd_distance: float | None
    rounds: int
    aim: float | None

    @property
    def times(self) -> float:
        return self.svd / self.products


def task_vectors(shape: Shape, k: int, spectrum: str, device: str) -> list[Tensor]:
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


def measured(
    method: str, taus: list[Tensor], spectrum: str, rounds: int, device: str, reference: bool
) -> Row:
    """One row of the table: both ways ``rounds`` times in turns, after a small warm-up."""
    variants: dict[str, Factorizations] = {
        "products": FastFactorizations(),
        "svd": ExactFactorizations(),
    }
    formula = METHODS[method]
    times: dict[str, list[float]] = {name: [] for name in variants}
    results: dict[str, Tensor] = {}
    for by in variants.values():
        formula([tau[:96, :96].clone() for tau in taus], by)
    if device == "cuda":  # libraries load, and kernels are chosen, at the size that is timed
        formula(taus, variants["products"])
    for _ in range(rounds):
        for name, by in variants.items():
            took, results[name] = seconds(partial(formula, taus, by), device)
            times[name].append(took)
    exact = results["svd"].double()
    if reference:
        exact = formula([tau.double() for tau in taus], variants["svd"])
    distance = {n: float((x.double() - exact).norm() / exact.norm()) for n, x in results.items()}
    shape: Shape = (taus[0].shape[0], taus[0].shape[1])
    aims = AIMS.get(method)
    aim = None if aims is None else aims[device == "cuda"] if shape[0] == shape[1] else 1.0
    return Row(
        method, shape, len(taus), spectrum,
        statistics.median(times["products"]), statistics.median(times["svd"]),
        distance["products"], distance["svd"] if reference else None, rounds, aim,
    )  # fmt: skip


def line(row: Row) -> str:
    """Of the table."""
    aim = "" if row.aim is None else f"{row.aim:g}"
    return (
        f"| {row.method} | {row.shape[0]} × {row.shape[1]} | {row.experts} | {row.spectrum} | "
        f"{row.rounds} | {row.products:.3g} | {row.svd:.3g} | {row.times:.2f} | {aim} | "
        f"{row.distance:.1e} | {'' if row.svd_distance is None else f'{row.svd_distance:.1e}'} |"
    )


HEAD = [
    "| method | shape | K | spectra | rounds | products, s | SVD, s | times | aim | distance "
    "| of SVD |",
    "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
]


def shape_of(word: str) -> Shape:
    """From ``ROWSxCOLUMNS``."""
    try:
        rows, columns = (int(x) for x in word.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, got {word!r}") from None
    return rows, columns


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes: list[Shape] = [(4096, 4096), (768, 3072)]
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=shapes)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--methods", choices=sorted(METHODS), nargs="+", default=list(AIMS))
    parser.add_argument("--spectrum", choices=("decay", "flat"), default="decay")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-reference", dest="reference", action="store_false")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(words)


def earlier(file: Path) -> list[Row]:
    """The rows of a report."""
    found = []
    for row in json.loads(file.read_text())["rows"]:
        row.pop("times")
        found.append(Row(**{**row, "shape": tuple(row["shape"])}))
    return found


def main() -> None:
    options = arguments()
    if options.add and not options.json:
        raise SystemExit("--add: expected --json FILE, whose rows are kept, got none.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device cuda: expected a GPU that torch sees, found none.")
    about = machine.facts("torch") | {"threads": str(torch.get_num_threads())}
    if options.device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    rows = earlier(options.json) if options.add and options.json.exists() else []
    print("\n".join(HEAD))
    for shape in options.shapes:
        taus = task_vectors(shape, options.experts, options.spectrum, options.device)
        for method in options.methods:
            row = measured(
                method, taus, options.spectrum, options.rounds, options.device, options.reference
            )
            rows = [r for r in rows if (r.method, r.shape) != (row.method, row.shape)] + [row]
            print(line(row), flush=True)
            if options.json:
                report = {"facts": about, "rows": [asdict(r) | {"times": r.times} for r in rows]}
                options.json.write_text(json.dumps(report, indent=1) + "\n")
            if options.markdown:
                table = [*HEAD, *map(line, rows), "", machine.line(about)]
                options.markdown.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()

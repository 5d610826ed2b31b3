"""PEFT's merges of adapters with our functions in their place against its own, interleaved in one
run, the answers compared.

    python benchmarks/dropin/peft.py [--size N] [--experts K] [--rank R] [--rounds N] [--only WORD]
    [--markdown FILE]

Needs peft (`pip install '.[peft]'`). K tensors N × N in bfloat16 for the functions; K adapters of
rank R on one N-wide layer in float32 for `add_weighted_adapter`, whose own svd is timed once.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.integrations import peft as front

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402 - benchmarks/machine.py

DENSITY = 0.2


@dataclass
class Job:
    """One call, which looks its function up in PEFT each time."""

    name: str
    run: Callable[[], Any]
    compare: Callable[[Any, Any], str]
    aim: str = ""
    rounds: int | None = None  # fewer than the others, where PEFT takes long


def _timed(job: Job, rounds: int) -> tuple[list[float], list[float], str]:
    own: list[float] = []
    ours: list[float] = []
    words = ""
    for _ in range(rounds if job.rounds is None else job.rounds):
        start = time.perf_counter()
        theirs = job.run()
        own.append(time.perf_counter() - start)
        with front.install():
            if not ours:
                job.run()  # memory, threads
            start = time.perf_counter()
            here = job.run()
            ours.append(time.perf_counter() - start)
        words = job.compare(theirs, here)
        del theirs, here
    return own, ours, words


def _tied(tensors: Sequence[Tensor]) -> Tensor:
    """Entries at which some expert's magnitude equals its threshold."""
    k = int(DENSITY * tensors[0].numel())
    found = torch.zeros(tensors[0].shape, dtype=torch.bool)
    for x in tensors:
        found |= x.abs() == torch.topk(x.abs().flatten(), k).values[-1]
    return found


def _off(own: Tensor, ours: Tensor, reach: Tensor) -> Tensor:
    """Where they differ by more than bfloat16 products in float32 may."""
    return (own - ours).abs() > reach * 2.0**-22


def functions(tensors: list[Tensor], weights: Tensor) -> list[Job]:
    from peft.utils import merge_utils

    reach = sum((x.float().abs() for x in tensors), torch.zeros(tensors[0].shape))
    n = reach.numel()

    def exact(own: Tensor, ours: Tensor) -> str:
        return f"{int(_off(own, ours, reach).sum())} of {n} beyond rounding"

    def trimmed(own: Tensor, ours: Tensor) -> str:
        off, tied = _off(own, ours, reach), _tied(tensors)
        return (
            f"{int((off & ~tied).sum())} of {n} beyond rounding, and {int((off & tied).sum())} of "
            f"the {int(tied.sum())} where an expert's entry equals its threshold"
        )

    def drawn(own: Tensor, ours: Tensor) -> str:
        shares = [float((x != 0).float().mean()) for x in (own, ours)]
        norms = [float(x.norm()) for x in (own, ours)]
        return f"non-zero share {shares[0]:.4f} and {shares[1]:.4f}, norm ratio " + (
            f"{norms[1] / norms[0]:.4f}"
        )

    def job(name: str, compare: Any, aim: str = "") -> Job:
        rest = () if name == "task_arithmetic" else (DENSITY,)
        return Job(name, lambda: getattr(merge_utils, name)(tensors, weights, *rest), compare, aim)

    return [
        job("ties", trimmed, "≥ 10"),
        job("dare_ties", drawn, "≥ 10"),
        job("magnitude_prune", trimmed),
        job("dare_linear", drawn),
        job("task_arithmetic", exact),
    ]


def adapters(size: int, experts: int, rank: int) -> list[Job]:
    import peft

    names = [f"a{k}" for k in range(experts)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=False
        )
        model: Any = None
        layer = nn.Sequential(nn.Linear(size, size, bias=False))
        for name in names:
            if model is None:
                model = peft.get_peft_model(layer, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    target = model.base_model.model[0]
    weights = [1.0 / experts] * experts

    def combined(kind: str, **options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            model.add_weighted_adapter(names, weights, "merged", kind, **options)
            found = target.lora_A["merged"].weight.data, target.lora_B["merged"].weight.data
            model.delete_adapter("merged")
            return found

        return run

    def products(own: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> str:
        """‖B·A − B′·A′‖ ÷ ‖B·A‖ (‖·‖ of Frobenius)."""
        a, b = (up.double() @ down.double() for down, up in (own, ours))
        return f"relative difference of the products {float((a - b).norm() / a.norm()):.1e}"

    return [
        Job("add_weighted_adapter svd", combined("svd"), products, "≥ 20", rounds=1),
        Job("add_weighted_adapter ties", combined("ties", density=DENSITY), products),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="jobs whose name has this word")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    logging.getLogger("magic_fast").setLevel(logging.WARNING)
    facts = machine.facts("torch", "peft") | {"threads": str(torch.get_num_threads())}
    torch.manual_seed(0)
    size, experts = options.size, options.experts
    tensors = [(torch.randn(size, size) * 1e-3).bfloat16() for _ in range(experts)]
    weights = torch.full((experts,), 1.0 / experts)
    jobs = functions(tensors, weights) + adapters(size, experts, options.rank)
    lines = [
        f"K = {experts}; functions on {size} × {size} bfloat16 with float32 weights, density "
        f"{DENSITY}; adapters of rank {options.rank} on one {size} × {size} layer, float32. "
        f"Medians of {options.rounds} interleaved rounds (svd: one).",
        "",
        "| call | PEFT's own, s | with ours, s | times | aim | answers |",
        "|---|--:|--:|--:|--:|---|",
    ]
    print(machine.line(facts), *lines, sep="\n")
    for job in jobs:
        if options.only in job.name:
            own, ours, words = _timed(job, options.rounds)
            a, b = statistics.median(own), statistics.median(ours)
            lines.append(f"| {job.name} | {a:.3f} | {b:.4f} | {a / b:.1f} | {job.aim} | {words} |")
            print(lines[-1], flush=True)
    if options.markdown:
        head = ["# PEFT's merges with ours in their place", "", machine.line(facts), ""]
        options.markdown.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()

"""A few small merges of every kind, for compute-sanitizer: each kernel once, tails included.

compute-sanitizer --tool memcheck python benchmarks/gpu/short.py [--device cpu]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from bench import make_job  # noqa: E402 - benchmarks/gpu/bench.py
from recipes import recipes  # noqa: E402 - benchmarks/recipes.py, by bench's path

from magic_fast import ops  # noqa: E402
from magic_fast.ops.registry import why_unavailable  # noqa: E402
from magic_fast.recipe import (  # noqa: E402
    Recipe,
    Reduce,
    Rescale,
    Trim,
    TrimRule,
    ZeroVote,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if why_unavailable("cuda"):
        raise SystemExit(f"backend cuda: {why_unavailable('cuda')}")
    from dataclasses import replace

    timed = recipes(3)
    ties = timed["ties"]
    kinds = {
        "sum": timed["task_arithmetic"],
        "ties": ties,
        "dare": timed["dare_ties"],
        "majority": replace(ties, zero_vote=ZeroVote.MAJORITY, rescale=Rescale.L1),
        "largest": replace(ties, reduce=Reduce.MAX),
        "ranked": Recipe((1.0,) * 3, trim=Trim(TrimRule.RANKED, (0.5,) * 3, epsilon=(0.1,) * 3)),
        "band": Recipe((1.0,) * 3, trim=Trim(TrimRule.BAND, (0.6,) * 3, gamma=(0.05,) * 3)),
    }
    for name, recipe in kinds.items():
        for shape in ((37, 1003), (129, 264)):
            for wsc in (False, True):
                ops.merge([make_job(shape, 3, recipe, 0, device, wsc)], backend="cuda")
        print(name, "done")
    many = [make_job((n,), 3, kinds["sum"], n, device, False) for n in (5, 1024, 3001)]
    ops.merge(many, backend="cuda")
    ops.merge([make_job((5, 2000), 11, recipes(11)["ties"], 0, device)], backend="cuda")
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

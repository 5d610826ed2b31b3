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
from bench import dare, make_job, ties  # noqa: E402 - benchmarks/gpu/bench.py

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

    recipes = {
        "sum": Recipe((0.3,) * 3),
        "ties": ties(3),
        "dare": dare(3),
        "majority": replace(ties(3), zero_vote=ZeroVote.MAJORITY, rescale=Rescale.L1),
        "largest": replace(ties(3), reduce=Reduce.MAX),
        "ranked": Recipe((1.0,) * 3, trim=Trim(TrimRule.RANKED, (0.5,) * 3, epsilon=(0.1,) * 3)),
        "band": Recipe((1.0,) * 3, trim=Trim(TrimRule.BAND, (0.6,) * 3, gamma=(0.05,) * 3)),
    }
    for name, recipe in recipes.items():
        for shape in ((37, 1003), (129, 264)):
            for wsc in (False, True):
                ops.merge([make_job(shape, 3, recipe, 0, device, wsc)], backend="cuda")
        print(name, "done")
    many = [make_job((n,), 3, recipes["sum"], n, device, False) for n in (5, 1024, 3001)]
    ops.merge(many, backend="cuda")
    ops.merge([make_job((5, 2000), 11, ties(11), 0, device)], backend="cuda")
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

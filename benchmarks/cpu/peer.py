"""One tool in use, timed in its own environment: a process that merges on request.

Started by `against.py` with the Python of that environment. Reads lines from standard input, each
the name of a tool, and answers each with the seconds that one merge took, or with `absent` and why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

Tool = Callable[[torch.Tensor, list[torch.Tensor]], Callable[[], object]]


def data(k: int, rows: int, cols: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The tensors of `bench.data`: this process cannot import the project."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(rows, cols, generator=generator) * 0.02).bfloat16()
    experts = []
    for _ in range(k):
        step = torch.randn(rows, cols, generator=generator) * 0.0015
        experts.append((base.float() + step).bfloat16())
    return base, experts


def _mergekit(method: str, **parameters: float) -> Tool:
    def prepare(base: torch.Tensor, experts: list[torch.Tensor]) -> Callable[[], object]:
        from mergekit.merge_methods.api import merge_tensors

        return lambda: merge_tensors([base, *experts], method, parameters=parameters, base_index=0)

    return prepare


def peft_ties(base: torch.Tensor, experts: list[torch.Tensor]) -> Callable[[], object]:
    from peft.utils.merge_utils import ties

    vectors = [e - base for e in experts]  # PEFT merges task vectors; forming them is not timed
    return lambda: ties(vectors, torch.ones(len(vectors)), 0.2)


TOOLS = {
    "mergekit ties": _mergekit("ties", weight=1.0, density=0.2),
    "mergekit della": _mergekit("della", weight=1.0, density=0.5, epsilon=0.15),
    "peft ties": peft_ties,
}


def main() -> None:
    k, rows, cols, threads = map(int, sys.argv[1:5])
    torch.set_num_threads(threads)
    base, experts = data(k, rows, cols)
    ready: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in ready:
                ready[name] = TOOLS[name](base, experts)
            start = time.perf_counter()
            ready[name]()
            print(time.perf_counter() - start, flush=True)
        except ImportError as error:
            print(f"absent {error}", flush=True)


if __name__ == "__main__":
    main()

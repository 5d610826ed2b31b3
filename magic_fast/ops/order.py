"""The order in which the automatic choice tries backends of one device, by what was measured."""

from __future__ import annotations

from enum import Enum
from math import prod

from magic_fast.ops.job import Job

SMALL_ELEMENTS = 1 << 18  # of a tensor; larger ones fill a GPU by themselves


class Operation(str, Enum):
    """What a call does with a tensor, as far as it decides which backend is the fastest.

    SUM: one or two reads, nothing to look for first. SEARCH: thresholds over the tensor, by
    magnitude, and what follows. SMALL: a small tensor, many of which go in one launch. ROWS:
    sums over rows: norms, inner products. OTHER: anything that nobody has measured.
    """

    SUM = "sum"
    SEARCH = "search"
    SMALL = "small"
    ROWS = "rows"
    OTHER = "other"


#: Fastest first. Source: the table "One merge" of benchmarks/results/gpu.md, one H100; whoever
#: measures anew changes it here. Backends that it does not name keep their place in the registry.
FASTEST: dict[Operation, tuple[str, ...]] = {
    # task arithmetic, K = 8: 874 and 1340 µs; DARE-TIES: 2622 and 3424; a block of Llama 8B,
    # task arithmetic, K = 4: 2559 and 4165
    Operation.SUM: ("triton", "cuda"),
    # TIES q 0.2, K = 3: 4126 and 4169 µs; K = 8: 6477 and 6847
    Operation.SEARCH: ("cuda", "triton"),
    # 2000 tensors of 4096, task arithmetic, K = 4: 43 and 86 µs
    Operation.SMALL: ("triton", "cuda"),
    # row norms + Gram, K = 8: 737 and 1124 µs
    Operation.ROWS: ("triton", "cuda"),
    # not measured (PCB, SCE, RAM, trims by variance …): Triton is ahead in five rows of seven
    Operation.OTHER: ("triton", "cuda"),
}

_OF_PRIMITIVE = {"row_stats": Operation.ROWS, "calibrate": Operation.ROWS}


def operation_of(job: Job, primitive: str = "merge") -> Operation:
    """What a primitive does for a job. It looks at this one job alone, so that a tensor is merged
    by the same backend in whatever company it comes."""
    if primitive not in ("merge", "select"):
        return _OF_PRIMITIVE.get(primitive, Operation.OTHER)
    recipe = job.recipe
    if recipe.needs_select and job.selection is None:
        by_magnitude = recipe.trim.by_magnitude and recipe.trims
        return Operation.SEARCH if by_magnitude and not recipe.looks_across else Operation.OTHER
    if job.calibration is None and prod(job.experts[0].shape) <= SMALL_ELEMENTS:
        return Operation.SMALL
    return Operation.SUM

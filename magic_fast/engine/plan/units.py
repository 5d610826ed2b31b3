"""Steps cut into units of work that fit into a block of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from magic_fast.checkpoint import DTYPE_BITS
from magic_fast.engine.plan.directions import vector_length
from magic_fast.engine.plan.memory import aligned
from magic_fast.engine.plan.step import Input, Step
from magic_fast.recipe import Granularity, TrimRule, Variant

_BYTES = {dtype: bits // 8 for dtype, bits in DTYPE_BITS.items()}
UNIT_BYTES = 8 << 20  # of a unit, where nothing asks for more; the next ones follow in its caches
SUM_BLOCK = 1 << 16  # elements; sums over a tensor are partials of so many, added in order


def element_size(dtype: str) -> int:
    """Bytes of one element."""
    return _BYTES[dtype]


def grain(step: Step) -> int:
    """The least number of consecutive elements that must be merged together; the whole tensor
    where rows are not consecutive or one number serves them all."""
    n, whole = vector_length(step) or 1, step.numel
    recipe, calibration = step.recipe, step.calibration
    if recipe is not None and recipe.trim.rule is TrimRule.RANKED:
        if len(step.shape) < 2 or (recipe.trim.rank_dim1 and len(step.shape) > 2):
            return whole
        n = whole // step.shape[0]
    if recipe is not None and recipe.needs_variance:  # the variances are held beside it
        return whole
    if calibration is not None:
        leading = calibration.axes == tuple(range(len(calibration.axes)))
        per_row = calibration.granularity is Granularity.ROW
        if not leading or not per_row or calibration.needs_tensors:
            return whole
        if calibration.variant is Variant.SPECTRAL:
            return whole
        n = max(n, calibration.cols)
    return n


def search_grain(step: Step) -> int:
    """The least number of consecutive elements that a search must see together: whole blocks of
    the sums over a tensor; and whole rows too, where ranks in them decide what is summed."""
    recipe = step.recipe
    ranked = recipe is not None and recipe.trim.rule is TrimRule.RANKED and recipe.needs_factors
    return math.lcm(SUM_BLOCK, grain(replace(step, calibration=None))) if ranked else SUM_BLOCK


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of one step."""

    step: Step
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.step.numel

    @property
    def count(self) -> int:
        return self.stop - self.start

    def byte_range(self, dtype: str) -> tuple[int, int]:
        """First byte and number of bytes of these elements in an array of ``dtype``."""
        size = element_size(dtype)
        return self.start * size, self.count * size

    def input_bytes(self, source: Input) -> int:
        return self.byte_range(source.info.dtype)[1]

    @cached_property
    def nbytes(self) -> int:
        """What this piece takes in a slot: every input, the output, and the inputs once more where
        they are rounded first."""
        return piece_bytes(self.step, self.count)


def piece_bytes(step: Step, count: int) -> int:
    """Bytes in a slot of ``count`` elements of a step."""
    total = aligned(count * _BYTES[step.dtype])
    if step.recipe is not None and step.recipe.needs_variance:
        total += aligned(count * _BYTES["F32"])  # the variances, for which this leaves room
    cast = None if step.copy else step.cast
    for source in step.inputs:
        dtype = source.info.dtype
        total += aligned(count * _BYTES[dtype])
        if cast is not None and dtype != cast:
            total += aligned(count * _BYTES[cast])
    return total


@dataclass
class Unit:
    """Pieces that are read, merged and written together.

    Attributes:
        pieces: in the order of the plan.
        streamed: held in a slot; otherwise in memory of its own.
        torch: merged by torch.
        search: a selection these pieces feed; nothing is written.
        staged: held by a device, which the blocks of memory only pass it on to.
        lane: which of several devices.
    """

    pieces: tuple[Piece, ...]
    streamed: bool = True
    torch: bool = False
    search: Any = None
    staged: bool = False
    lane: int = 0
    buffers: dict[str, Any] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        return sum(p.input_bytes(i) for p in self.pieces for i in p.step.inputs)

    @property
    def output_bytes(self) -> int:
        if self.search is not None:
            return 0
        return sum(p.byte_range(p.step.dtype)[1] for p in self.pieces)


def fits(step: Step, slot_bytes: int) -> bool:
    """Whether the whole step fits into one slot."""
    return piece_bytes(step, step.numel) <= slot_bytes


def cut(step: Step, slot_bytes: int) -> list[Piece]:
    """A step in pieces that fit a slot each; empty where one grain does not fit."""
    if step.numel == 0 or fits(step, slot_bytes):
        return [Piece(step, 0, step.numel)]
    unit = grain(step)
    per_element = piece_bytes(step, 1 << 16) / (1 << 16)
    count = int(slot_bytes * 0.98 / per_element) // unit * unit
    if count == 0 or piece_bytes(step, count) > slot_bytes:
        return []
    return [Piece(step, s, min(s + count, step.numel)) for s in range(0, step.numel, count)]


def group(pieces: Sequence[Piece], slot_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces that fit into one slot together."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + piece.nbytes > slot_bytes:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(piece)
        size += piece.nbytes
    if batch:
        yield tuple(batch)

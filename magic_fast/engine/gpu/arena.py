"""Where the tensors of a unit lie in one block of a device. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from magic_fast.engine.plan.memory import aligned
from magic_fast.engine.plan.step import Input
from magic_fast.engine.plan.units import Piece


@dataclass(frozen=True)
class Area:
    """``nbytes`` bytes from ``start`` on: an input of a piece, or (``source`` None) its output."""

    piece: Piece
    source: Input | None
    start: int
    nbytes: int


@dataclass(frozen=True)
class Arena:
    """All inputs one behind the other, then all outputs.

    Attributes:
        inputs: per piece, in the order of the step.
        outputs: one per piece.
        input_bytes: of all inputs, the gaps between them included.
        nbytes: of everything.
    """

    inputs: tuple[tuple[Area, ...], ...]
    outputs: tuple[Area, ...]
    input_bytes: int
    nbytes: int

    def chunks(self, size: int) -> Iterator[tuple[int, list[tuple[Area, int, int, int]]]]:
        """The inputs cut into blocks of ``size`` bytes: of each where it begins and what of which
        area lies in it, as (area, first byte of the area, place in the block, bytes)."""
        areas = [area for row in self.inputs for area in row if area.nbytes]
        for start in range(0, self.input_bytes, size):
            stop = min(start + size, self.input_bytes)
            parts = []
            for area in areas:
                first, last = max(area.start, start), min(area.start + area.nbytes, stop)
                if first < last:
                    parts.append((area, first - area.start, first - start, last - first))
            yield start, parts
            areas = [a for a in areas if a.start + a.nbytes > stop]


def arena_of(pieces: Sequence[Piece]) -> Arena:
    """The arena of whole tensors."""
    place, inputs = 0, []
    for piece in pieces:
        row = []
        for source in piece.step.inputs:
            nbytes = piece.byte_range(source.info.dtype)[1]
            row.append(Area(piece, source, place, nbytes))
            place += aligned(nbytes)
        inputs.append(tuple(row))
    end, outputs = place, []
    for piece in pieces:
        nbytes = piece.byte_range(piece.step.dtype)[1]
        outputs.append(Area(piece, None, place, nbytes))
        place += aligned(nbytes)
    return Arena(tuple(inputs), tuple(outputs), end, place)

"""Inner products of the inputs of linear maps, of one model on its own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from magic_fast.calibration.features.batches import faults
from magic_fast.calibration.features.gather import Sample, seen_together
from magic_fast.calibration.features.groups import Group
from magic_fast.calibration.features.padding import Positions
from magic_fast.calibration.features.sites import Site, Station
from magic_fast.reference.statistics import nearest, with_smaller_off_diagonal

MatrixKey: TypeAlias = tuple[str, int | None, int | None]  # a parameter and its rows, or all of it


@dataclass
class Moment:
    """Σ zᵀz over the inputs of one matrix.

    Attributes:
        gram: float32 (float64 of such a model), [in, in].
        positions: how many inputs.
        in_axis: the last (−1) or last but one (−2) axis of the matrix runs along the inputs.
    """

    gram: Tensor
    positions: int
    in_axis: int


Room: TypeAlias = Callable[[object, tuple[int, ...], torch.dtype], Tensor]  # zeros, by a key


def in_memory(key: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


class Grams:
    """Gathers the inner products of a run (:class:`.Visitor`).

    Attributes:
        found: matrix → its inputs' inner products.
    """

    def __init__(self, room: Room = in_memory) -> None:
        self._room = room
        self.found: dict[MatrixKey, Moment] = {}

    def at_call(
        self, sites: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
    ) -> None:
        for site, _ in sites:
            if site.in_axis is not None:
                for sample in samples:
                    with faults(site.name, sample.task, sample.batch.number, sample.call.again):
                        positions = sample.masks.at(station.module)
                        self._add(site, site.rows(site.inputs(sample.call), positions))

    def in_operations(
        self, sites: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
    ) -> None:
        for _, some, positions in seen_together(station, samples):
            for site, _ in sites:
                if site.in_axis is not None:
                    for sample, known in zip(some, positions, strict=True):
                        self._add(site, _rows(site, sample, known))

    def _add(self, site: Site, rows: Iterator[Tensor]) -> None:
        part = site.parts[0]
        key = matrix_key(part.name, part.rows)
        for z in rows:
            if len(z):
                moment = self.found.get(key)
                if moment is None:
                    assert site.in_axis is not None
                    gram = self._room(("gram", key), (z.shape[-1],) * 2, z.dtype)
                    moment = self.found[key] = Moment(gram, 0, site.in_axis)
                moment.gram += (z.t() @ z).to(moment.gram.device)
                moment.positions += len(z)


def _rows(site: Site, sample: Sample, positions: Positions) -> Iterator[Tensor]:
    yield from site.rows(site.inputs(sample.call), positions)


def matrix_key(name: str, rows: slice | None) -> MatrixKey:
    return (name, None, None) if rows is None else (name, rows.start, rows.stop)


def matrix_of(key: MatrixKey, parameter: Tensor, in_axis: int) -> Tensor:
    """A matrix of a parameter as a view [out, in]."""
    _, start, stop = key
    own = parameter if start is None else parameter[start:stop]
    own = own.reshape(own.shape[-2:]) if own.dim() > 2 else own
    return own if in_axis == -1 else own.t()


class Regression:
    """RegMean's sums over the experts.

    Args:
        off_diagonal: what inner products of different inputs are multiplied by.
        room: gives room for a sum.

    Attributes:
        positions: matrix → how many inputs, of all experts.
    """

    def __init__(self, off_diagonal: float, room: Room = in_memory) -> None:
        self._off_diagonal, self._room = off_diagonal, room
        self._sums: dict[MatrixKey, tuple[Tensor, Tensor, int]] = {}
        self.positions: dict[MatrixKey, int] = {}

    def add(
        self, found: Mapping[MatrixKey, Moment], weight: float, change: Callable[[str], Tensor]
    ) -> None:
        """The inputs of one expert. ``change``: a parameter → θ_k − mean."""
        for key, moment in found.items():
            gram = with_smaller_off_diagonal(moment.gram, self._off_diagonal)
            gram *= weight / moment.positions
            step = matrix_of(key, change(key[0]), moment.in_axis).to(gram)
            if key not in self._sums:
                shapes = {"left": tuple(gram.shape), "right": (len(gram), len(step))}
                left, right = (self._room((n, key), s, gram.dtype) for n, s in shapes.items())
                self._sums[key] = left, right, moment.in_axis
            left, right, _ = self._sums[key]
            left += gram
            right.addmm_(gram, step.t())
            self.positions[key] = self.positions.get(key, 0) + moment.positions

    def matrices(self) -> Iterator[MatrixKey]:
        """Those that some expert has inputs of."""
        yield from self._sums

    def solve(self, key: MatrixKey, parameter: Tensor) -> None:
        """Puts the nearest matrix in place of the mean in a parameter."""
        left, right, in_axis = self._sums[key]
        own = matrix_of(key, parameter, in_axis)
        own.copy_(nearest(own.to(left.dtype), left, right))

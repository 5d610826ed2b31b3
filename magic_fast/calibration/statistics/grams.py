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
from magic_fast.errors import NonFiniteError
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
        self._both: set[MatrixKey] = set()  # used along either axis: no one matrix is nearest

    def at_call(
        self, sites: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
    ) -> None:
        for site, _ in sites:
            if site.in_axis is not None:
                for sample in samples:
                    with faults(site.name, sample.task, sample.batch.number, sample.call.again):
                        positions = sample.masks.at(station.module)
                        self._add(site, sample, positions)

    def in_operations(
        self, sites: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
    ) -> None:
        for _, some, positions in seen_together(station, samples):
            for site, _ in sites:
                if site.in_axis is not None:
                    for sample, known in zip(some, positions, strict=True):
                        self._add(site, sample, known)

    def _add(self, site: Site, sample: Sample, positions: Positions) -> None:
        part = site.parts[0]
        key = matrix_key(part.name, part.rows)
        assert site.in_axis is not None
        for z in site.rows(site.inputs(sample.call), positions):
            if key in self._both or not len(z):
                continue
            moment = self.found.get(key)
            if moment is None:
                gram = self._room(("gram", key), (z.shape[-1],) * 2, z.dtype)
                moment = self.found[key] = Moment(gram, 0, site.in_axis)
            elif moment.in_axis != site.in_axis:
                self._both.add(key)
                del self.found[key]
                continue
            added = z.t() @ z
            if not bool(added.isfinite().all()):
                raise NonFiniteError(
                    f"inputs of layer {site.name!r} for batch {sample.batch.number} of task "
                    f"{sample.task!r}: expected numbers whose squares are finite, got NaN, "
                    "infinity or an overflow. Look at the samples and at the layers before it."
                )
            moment.gram += added.to(moment.gram.device)
            moment.positions += len(z)


def matrix_key(name: str, rows: slice | None) -> MatrixKey:
    return (name, None, None) if rows is None else (name, rows.start, rows.stop)


def matrix_of(key: MatrixKey, parameter: Tensor, in_axis: int, ins: int) -> Tensor:
    """A matrix of a parameter as a view [out, in]."""
    _, start, stop = key
    own = parameter if start is None else parameter[start:stop]
    own = own.reshape(own.shape[1:]) if own.dim() > 2 and len(own) == 1 else own
    if own.dim() == 2:
        return own if in_axis == -1 else own.t()
    return own.reshape(-1, ins) if in_axis == -1 else own.reshape(ins, -1).t()


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
            step = matrix_of(key, change(key[0]), moment.in_axis, len(gram)).to(gram)
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
        own = matrix_of(key, parameter, in_axis, len(left))
        own.copy_(nearest(own.to(left.dtype), left, right))

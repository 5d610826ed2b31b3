"""What a station's sites give for the task vectors of experts and of the merged model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from magic_fast.calibration.feature import FeatureCalibration, FeatureGranularity
from magic_fast.calibration.features.batches import faults
from magic_fast.calibration.features.discovery import look
from magic_fast.calibration.features.groups import Group
from magic_fast.calibration.features.lockstep import Batch
from magic_fast.calibration.features.padding import COUNTED, Masks, Positions
from magic_fast.calibration.features.sites import Call, Part, Site, Station
from magic_fast.errors import NonFiniteError
from magic_fast.reference.features import fold

_PIECE = 1 << 18  # elements of a difference taken at a time
_HELD = 1 << 25  # bytes that modules received whose operations are held together


class Weights(Protocol):
    """Where the weights of base, experts and merged model come from.

    Attributes:
        streamed: whether the weights are read when they are asked for.
        resident: whether the model's own are there outside of ``enter`` and ``leave`` too.
    """

    streamed: bool
    resident: bool

    def base(self, name: str) -> Tensor: ...

    def expert(self, number: int, name: str, rows: slice | None = None) -> Tensor:
        """Of one expert; ``rows``: those alone."""

    def merged(self, name: str) -> Tensor: ...

    def scratch(self, key: object, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the shape of ``like`` to write to, until it is asked for again by the key."""

    def enter(self, station: Station) -> None:
        """Before the station is looked at and run."""

    def leave(self, station: Station) -> None:
        """After it ran."""

    def put(self, station: Station, part: Part, value: Tensor) -> None:
        """Gives the model a calibrated parameter (the rows of ``part``) to go on with."""


@dataclass(frozen=True)
class Sample:
    """A batch on its way: the positions that count, and where it is."""

    batch: Batch
    masks: Masks
    call: Call

    @property
    def task(self) -> str:
        return self.batch.task

    @property
    def nbytes(self) -> int:
        """What the module received."""
        given = (*self.call.args, *self.call.kwargs.values())
        return sum(x.nbytes for x in given if isinstance(x, Tensor))


class Visitor(Protocol):
    """What looks at the inputs of sites."""

    def at_call(
        self, sites: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
    ) -> None:
        """Of sites whose inputs are what their station received."""

    def in_operations(
        self, sites: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
    ) -> None:
        """Of sites whose inputs are operations."""


Changes = list[dict[str, Tensor]]  # an expert's and the merged one


class Gatherer:
    """Adds to groups what their sites give.

    Args:
        weights: of base, experts and merged.
        experts: task → number of its expert.
        settings: of the calibration.
    """

    def __init__(
        self, weights: Weights, experts: Mapping[str, int], settings: FeatureCalibration
    ) -> None:
        self._weights, self._experts, self._settings = weights, dict(experts), settings
        self._tried: set[int] = set()

    def at_call(
        self, sites: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
    ) -> None:
        """Of sites whose inputs are what their station received: task by task."""
        for site, group in sites:
            base = self._base(site)
            merged = self._difference(site, self._merged, base, "merged")
            for task, own in _by_task(samples):
                expert = self._difference(site, self._expert(task), base, "expert")
                for sample in own:
                    positions = sample.masks.at(station.module)
                    with faults(site.name, task, sample.batch.number, sample.call.again):
                        self._add(site, group, sample, [expert, merged], positions)

    def in_operations(
        self, sites: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
    ) -> None:
        """Of sites whose inputs are operations, as many samples together as these are held of."""
        for task, some, positions in seen_together(station, samples):
            for site, group in sites:
                self._reached(site, group, task, some, positions)

    def _reached(
        self,
        site: Site,
        group: Group,
        task: str,
        samples: Sequence[Sample],
        positions: Sequence[Positions],
    ) -> None:
        reached = [pair for pair in zip(samples, positions, strict=True)
                   if site.inputs(pair[0].call)]  # fmt: skip
        if not reached:
            return
        group.calls += sum(s.batch.begins * operations(site, s.call) for s, _ in reached)
        base = self._base(site)
        expert = self._difference(site, self._expert(task), base, "expert")
        merged = self._difference(site, self._merged, base, "merged")
        for sample, known in reached:
            self._add(site, group, sample, [expert, merged], known)

    def _add(
        self, site: Site, group: Group, sample: Sample, changes: Changes, positions: Positions
    ) -> None:
        inputs = site.inputs(sample.call)
        if id(site) not in self._tried:
            self._tried.add(id(site))
            if self._settings.granularity is FeatureGranularity.CHANNEL:
                first = next(site.features(inputs, changes[-1:], None))[0]
                site.channel_axes(inputs, changes[-1], first.shape[-1])
        for own, merged in site.features(inputs, changes, positions):
            if not group.add(sample.task, own, merged):
                raise NonFiniteError(
                    f"features of layer {site.name!r} for batch {sample.batch.number} of task "
                    f"{sample.task!r}: expected finite numbers, got NaN or infinity. Look at the "
                    "samples and at the layers before it; half precision may overflow: load the "
                    "models in float32."
                )
        if positions.unknown and COUNTED not in group.remarks:
            group.remarks.append(COUNTED)

    def _base(self, site: Site) -> dict[str, Tensor]:
        return {p.local: p.cut(self._weights.base(p.name)) for p in site.parts}

    def _merged(self, part: Part) -> Tensor:
        return part.cut(self._weights.merged(part.name))

    def _expert(self, task: str) -> Callable[[Part], Tensor]:
        number = self._experts[task]
        return lambda part: self._weights.expert(number, part.name, part.rows)

    def _difference(
        self, site: Site, source: Callable[[Part], Tensor], base: Mapping[str, Tensor], whose: str
    ) -> dict[str, Tensor]:
        """A site's task vector in float32 (float64 for float64), the only copy that is made."""
        found = {}
        for part in site.parts:
            value, start = source(part), base[part.local]
            narrow = torch.promote_types(value.dtype, start.dtype)
            wide = torch.promote_types(narrow, torch.float32)
            own = self._weights.scratch((whose, part.local), value, wide)
            # in pieces: a difference of two dtypes makes a copy of its second term
            flat = (torch.split(x.reshape(-1), _PIECE) for x in (own, value, start))
            for piece, end, begin in zip(*flat, strict=True):
                piece.copy_(end).sub_(begin)
            found[part.local] = own
        return found

    def folded(self, site: Site, group: Group) -> Iterator[tuple[Part, Tensor]]:
        """The calibrated parameters of a site (their rows)."""
        factor = group.factor()
        for part in site.parts:
            base, merged = (
                part.cut(f(part.name)) for f in (self._weights.base, self._weights.merged)
            )
            axis = None if not factor.dim() else (site.axes or {})[part.local]
            yield part, fold(base, merged, factor, axis)


def operations(site: Site, call: Call) -> int:
    """In how many operations a site was seen; a batch of products is one."""
    return len({id(found.use) for found in site.inputs(call)})


def seen_together(
    station: Station, samples: Sequence[Sample]
) -> Iterator[tuple[str, list[Sample], list[Positions]]]:
    """(task, samples whose operations are held, the positions of each that count)."""
    for task, own in _by_task(samples):
        for some in _some(own):
            positions = [s.masks.at(station.module) for s in some]
            if station.called:
                for sample, known in zip(some, positions, strict=True):
                    with faults(station.name, task, sample.batch.number, sample.call.again):
                        look(station, sample.call, known)
            yield task, some, positions
            if station.called:
                for sample in some:
                    sample.call.seen.clear()


def _by_task(samples: Sequence[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    for task, own in groupby(sorted(samples, key=lambda s: s.task), key=lambda s: s.task):
        yield task, list(own)


def _some(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """The samples, so many at a time that what their modules received is not much: operations hold
    several times that, by experts and by widths."""
    held, some = 0, list[Sample]()
    for sample in samples:
        if some and held + sample.nbytes > _HELD:
            yield some
            held, some = 0, []
        some.append(sample)
        held += sample.nbytes
    if some:
        yield some


def count_uses(
    pairs: Sequence[tuple[Site, Group]], station: Station, samples: Sequence[Sample]
) -> None:
    """Counts the uses of sites that are not looked at."""
    for _, some, _ in seen_together(station, samples) if pairs else ():
        for site, group in pairs:
            group.calls += sum(s.batch.begins * operations(site, s.call) for s in some)


def factors_of(
    stations: Sequence[Station], group_of: Mapping[int, Group]
) -> dict[str, tuple[Tensor, int | None]]:
    """Parameter → what multiplies its change: one number, or one for each index of an axis."""
    found: dict[str, tuple[Tensor, int | None]] = {}
    for station in stations:
        for site in station.sites:
            factor = group_of[id(site)].factor()
            for part in site.parts:
                axis = None if not factor.dim() else (site.axes or {})[part.local]
                value = factor
                if part.rows is not None:  # of a parameter that several sites share
                    axis = 0
                    before = found.get(part.name)
                    size = station.module.get_parameter(part.local).shape[0]
                    value = torch.ones(size).double() if before is None else before[0]
                    if value.dim():  # else the whole parameter has one
                        value[part.rows] = factor
                found[part.name] = value, axis
    return found

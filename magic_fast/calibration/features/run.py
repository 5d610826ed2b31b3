"""Runs the merged model on the samples and finds ξ of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from magic_fast.calibration.feature import FeatureCalibration, FeatureGranularity
from magic_fast.calibration.features.batches import (
    Masks,
    batches_of,
    faults,
    plain_attention,
    run_batch,
    to_device,
)
from magic_fast.calibration.features.groups import Group, group_sites
from magic_fast.calibration.features.left import parameters_of, shares_left
from magic_fast.calibration.features.lockstep import Lockstep
from magic_fast.calibration.features.sites import Call, Part, Site, Station
from magic_fast.calibration.features.walk import find_stations
from magic_fast.reference.features import fold

Progress = Callable[[int, int, str], None]  # stations done, of how many, the last one's name

_PIECE = 1 << 18  # elements of a difference taken at a time


class Weights(Protocol):
    """Where the weights of base, experts and merged model come from.

    Attributes:
        streamed: whether the model's own weights are there only between ``enter`` and ``leave``.
    """

    streamed: bool

    def base(self, name: str) -> Tensor: ...

    def expert(self, number: int, name: str) -> Tensor: ...

    def merged(self, name: str) -> Tensor: ...

    def scratch(self, key: object, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the shape of ``like`` to write to, until it is asked for again by the key."""

    def enter(self, station: Station) -> None:
        """Before the station is looked at and run."""

    def leave(self, station: Station) -> None:
        """After it ran."""

    def put(self, station: Station, part: Part, value: Tensor) -> None:
        """Gives the model a calibrated parameter (the rows of ``part``) to go on with."""


@dataclass
class _Sample:
    """One batch on its way: its task, the positions that count, and where it is."""

    task: str
    number: int
    masks: Masks
    call: Call | None = None


class FeatureRun:
    """One calibration: the stations of ``model``, their groups, and ξ found by running it.

    Args:
        model: with the merged weights, in evaluation mode; hooks are set while it runs.
        weights: of base, experts and merged.
        experts: task → number of its expert.
        settings: of the calibration.
        device: of the batches; None: that of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        experts: Mapping[str, int],
        settings: FeatureCalibration,
        progress: Progress | None = None,
        device: str | None = None,
    ) -> None:
        self._model, self._weights, self._settings = model, weights, settings
        self._experts = dict(experts)
        self.stations, self.left = find_stations(model)
        self._parameters = parameters_of(model)
        self.groups = group_sites(self.stations, settings)
        self._group_of = {id(site): group for group in self.groups for site in group.sites}
        self._tried: set[int] = set()
        self._progress, self._device = progress, device
        self._seen: set[int] = set()

    def run(self, data: Mapping[str, Any]) -> None:
        """Finds ξ of every group; afterwards each has its ``settled``."""
        if not self._settings.sequential:
            self._pass(data, self.groups, settle=False)
        else:
            pooled = self._pooled(data)
            if pooled:  # their ξ comes from all of their uses: before the first one is calibrated
                self._pass(data, pooled, settle=False)
            for group in pooled:
                group.settle()
            for group in self.groups:
                group.calls = 0
            self._pass(data, self.groups, settle=True)
        for group in self.groups:
            group.settle()

    def _pooled(self, data: Mapping[str, Any]) -> list[Group]:
        """Groups that are used more than once in one run of the model."""
        task = next(iter(self._experts))
        first = next(batches_of(data, task))
        self._pass({task: [first]}, [], settle=False)
        return [g for g in self.groups if g.calls > 1]

    def _pass(self, data: Mapping[str, Any], groups: Sequence[Group], *, settle: bool) -> None:
        """All batches through the model once; ``groups`` gather their features, and where
        ``settle`` is set each is calibrated before the model goes on."""
        gathering = {id(g) for g in groups if g.settled is None}
        self._seen = set()
        if not (settle or self._weights.streamed):
            for task, number, batch in self._batches(data):
                current = _Sample(task, number, Masks(self._model, batch))
                visit = partial(self._visit_alone, current, gathering)
                with _hooks(self.stations, visit), torch.no_grad():
                    run_batch(self._model, batch, task, number)
            return
        batches = list(self._batches(data))
        samples = [_Sample(t, n, Masks(self._model, batch)) for t, n, batch in batches]

        def job(task: str, number: int, batch: Any) -> Callable[[], object]:
            return lambda: run_batch(self._model, batch, task, number) is None

        lock: Lockstep[tuple[Station, Call]] = Lockstep([job(*b) for b in batches])
        entered: list[Station] = []

        def settled(arrived: list[tuple[int, tuple[Station, Call]]]) -> None:
            station = arrived[0][1][0]
            entered[:] = [station]
            self._weights.enter(station)
            found = [replace(samples[n], call=call) for n, (_, call) in arrived]
            self._visit(station, found, gathering, settle=settle)

        with _hooks(self.stations, lambda s, call: lock.arrive((s, call))), torch.no_grad():
            lock.run(lambda p: id(p[0]), settled, lambda: self._weights.leave(entered[0]))

    def _batches(self, data: Mapping[str, Any]) -> Iterator[tuple[str, int, Any]]:
        first = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        device = first if self._device is None else torch.device(self._device)
        for task in data:
            for number, batch in enumerate(batches_of(data, task)):
                yield task, number, to_device(batch, device)

    def _visit_alone(
        self, sample: _Sample, gathering: set[int], station: Station, call: Call
    ) -> None:
        self._visit(station, [replace(sample, call=call)], gathering, settle=False)

    def _visit(
        self, station: Station, samples: Sequence[_Sample], gathering: set[int], *, settle: bool
    ) -> None:
        for stage in station.stages:
            for site in stage:
                group = self._group_of[id(site)]
                group.calls += len(samples)
                if id(group) in gathering and group.settled is None and not group.refused:
                    self._gather(site, group, station, samples)
            if settle:
                for site in stage:
                    group = self._group_of[id(site)]
                    group.settle()
                    for part, value in self.folded(site, group):
                        self._weights.put(station, part, value)
        if self._progress is not None and id(station) not in self._seen:
            self._seen.add(id(station))
            self._progress(len(self._seen), len(self.stations), station.name)

    def _gather(
        self, site: Site, group: Group, station: Station, samples: Sequence[_Sample]
    ) -> None:
        base = {p.local: p.cut(self._weights.base(p.name)) for p in site.parts}
        merged = self._difference(site, self._weights.merged, base, "merged")
        for task, own in groupby(sorted(samples, key=lambda s: s.task), key=lambda s: s.task):
            number = self._experts[task]
            expert = self._difference(site, partial(self._weights.expert, number), base, "expert")
            for sample in own:
                with faults(site.name, task, sample.number, partial(_again, sample.call)):
                    self._gather_sample(site, group, station, sample, [expert, merged])
                if site.refused:
                    return

    def _gather_sample(
        self,
        site: Site,
        group: Group,
        station: Station,
        sample: _Sample,
        changes: list[dict[str, Tensor]],
    ) -> None:
        assert sample.call is not None
        inputs = site.inputs(sample.call)
        if id(site) not in self._tried:
            self._tried.add(id(site))
            self._try(site, inputs, changes[-1])
        if not site.refused:
            mask = sample.masks.of(station.module)
            for own, merged in site.features(inputs, changes, mask):
                group.add(sample.task, own, merged)

    def _try(self, site: Site, inputs: Any, like: dict[str, Tensor]) -> None:
        if not site.known:
            site.try_affine(inputs, like)
        if self._settings.granularity is FeatureGranularity.CHANNEL and not site.refused:
            first = next(site.features(inputs, [like], None))[0]
            site.channel_axes(inputs, like, first.shape[-1])

    def _difference(
        self, site: Site, source: Callable[[str], Tensor], base: Mapping[str, Tensor], whose: str
    ) -> dict[str, Tensor]:
        """A site's task vector in float32 (float64 for float64), the only copy that is made."""
        found = {}
        for part in site.parts:
            value, start = part.cut(source(part.name)), base[part.local]
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

    def shares_left(self) -> dict[str, float]:
        """Reason → share of the model's floating parameters that ``run`` did not calibrate."""
        return shares_left(self._parameters, self.groups, self.left)

    def factors(self) -> dict[str, tuple[Tensor, int | None]]:
        """Parameter → what multiplies its change: one number, or one for each index of an axis."""
        found: dict[str, tuple[Tensor, int | None]] = {}
        for station in self.stations:
            own = dict(station.module.named_parameters())
            for site in station.sites:
                factor = self._group_of[id(site)].factor()
                for part in site.parts:
                    axis = None if not factor.dim() else (site.axes or {})[part.local]
                    value = factor
                    if part.rows is not None:  # of a parameter that several sites share
                        axis = 0
                        before = found.get(part.name)
                        size = own[part.local].shape[0]
                        value = torch.ones(size).double() if before is None else before[0]
                        value[part.rows] = factor
                    found[part.name] = value, axis
        return found


def _again(call: Call | None) -> None:
    """The call as the model makes it, without hooks."""
    assert call is not None
    call.module.forward(*call.args, **call.kwargs)


@contextmanager
def _hooks(stations: Sequence[Station], visit: Callable[[Station, Call], None]) -> Iterator[None]:
    """``visit`` is called before each call of a station."""

    def hook(station: Station) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            visit(station, Call(module, args, kwargs))

        return before

    with plain_attention(), ExitStack() as hooks:
        for s in stations:
            handle = s.module.register_forward_pre_hook(hook(s), with_kwargs=True)
            hooks.callback(handle.remove)
        yield

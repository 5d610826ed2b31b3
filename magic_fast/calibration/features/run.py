"""Runs the merged model on the samples and finds ξ of every layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.calibration.features.batches import (
    batches_of,
    faults,
    run_batch,
    to_device,
)
from magic_fast.calibration.features.discovery import (
    LATER,
    Loose,
    Visit,
    resolve,
)
from magic_fast.calibration.features.gather import (
    Gatherer,
    Sample,
    Visitor,
    Weights,
    count_uses,
    factors_of,
)
from magic_fast.calibration.features.groups import Group, group_sites
from magic_fast.calibration.features.left import parameters_of, shares_left
from magic_fast.calibration.features.lockstep import MOST_TOGETHER, Batch, Lockstep, joined
from magic_fast.calibration.features.padding import Masks, without_padding
from magic_fast.calibration.features.sites import Call, Part, Site, Station
from magic_fast.calibration.features.walk import find_stations, hooked
from magic_fast.calibration.plainly import plainly
from magic_fast.errors import InputError

Progress = Callable[[int, int, str], None]  # stations done, of how many, the last one's name

log = logging.getLogger("magic_fast")


class FeatureRun:
    """One calibration: the stations of ``model``, their groups, and ξ found by running it.

    Args:
        model: with the merged weights, in evaluation mode; hooks are set while it runs.
        weights: of base, experts and merged.
        experts: task → number of its expert.
        settings: of the calibration.
        device: of the batches; None: that of the model.
        gatherer: what takes the inputs of sites instead of ξ.

    Attributes:
        left: parameter → why no site has it.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        experts: Mapping[str, int],
        settings: FeatureCalibration,
        progress: Progress | None = None,
        device: str | None = None,
        gatherer: Visitor | None = None,
    ) -> None:
        self._model, self._weights, self._settings = model, weights, settings
        self._experts = dict(experts)
        self._gatherer = Gatherer(weights, experts, settings)
        self._visitor_of_sites: Visitor = gatherer or self._gatherer
        self.stations, self.left = find_stations(model)
        self._parameters = parameters_of(model)
        self._loose: Loose | None = None
        self._regroup()
        self._resolved: set[int] = set()
        self._progress, self._device = progress, device
        self._seen: set[int] = set()

    def _regroup(self) -> None:
        self.groups = group_sites(self.stations, self._settings)
        self._group_of = {id(site): group for group in self.groups for site in group.sites}

    def run(self, data: Mapping[str, Any]) -> None:
        """Finds ξ of every group; afterwards each has its ``settled``."""
        with plainly(self._model):
            if self._settings.sequential:  # passes more than once over what may be read once
                data = {task: list(batches_of(data, task)) for task in data}
            if self._weights.resident:
                task = next(iter(self._experts))
                batches = iter(data[task] if self._settings.sequential else batches_of(data, task))
                first = next(batches)
                if not self._settings.sequential:
                    data = {**data, task: chain([first], batches)}
                self._discover({task: [first]})
            if not self._settings.sequential:
                self._pass(data, self.groups, settle=False)
            else:
                pooled = self._pooled(data)
                if pooled:  # their ξ comes from all of their uses: before the first is calibrated
                    self._pass(data, pooled, settle=False)
                for group in pooled:
                    group.settle()
                for group in self.groups:
                    group.calls = 0
                self._pass(data, self.groups, settle=True)
            for group in self.groups:
                group.settle()

    def _discover(self, data: Mapping[str, Any]) -> None:
        """Adds the stations of parameters that the model uses outside of their modules' calls."""
        batch = next(self._batches(data))
        loose = Loose(self._model, self.stations)
        with torch.no_grad():
            try:
                loose.find(lambda: self._call(batch))
            except InputError as error:
                self._call(batch)  # is it the data?
                log.warning(
                    "where the model uses weights outside of their layers' calls is not known: "
                    "it does not run while its operations are watched (%s)",
                    error.__cause__,
                )
                return
        found = {p.name for station in loose.stations for s in station.sites for p in s.parts}
        if found:
            self.left = {n: why for n, why in self.left.items() if n not in found}
            self._loose = loose
            called = [
                s
                for s in self.stations
                if id(s.module) in loose.called
                or not {p.name for site in s.sites for p in site.parts} <= found
            ]
            self.stations = called + loose.stations
            self._regroup()

    def _pooled(self, data: Mapping[str, Any]) -> list[Group]:
        """Groups that are used more than once in one run of the model."""
        task = next(iter(self._experts))
        first = next(self._batches({task: data[task]}))
        self._pass({task: [first.values]}, [], settle=False)
        return [g for g in self.groups if g.calls > 1]

    def _pass(self, data: Mapping[str, Any], groups: Sequence[Group], *, settle: bool) -> None:
        """All batches through the model once; ``groups`` gather their features, and where
        ``settle`` is set each is calibrated before the model goes on."""
        gathering = {id(g) for g in groups if g.settled is None}
        self._seen = set()
        if not (settle or self._weights.streamed):
            for batch in self._batches(data):
                visit = self._visitor(batch, gathering)
                with self._watching(visit), self._watched(visit):
                    self._call(batch)
            return
        batches = joined(list(self._batches(data)), MOST_TOGETHER)
        masks = [Masks(self._model, batch.values) for batch in batches]

        def job(batch: Batch) -> Callable[[], object]:
            def run() -> None:
                with self._watched(arrive):  # operations are seen in the thread that runs them
                    self._call(batch)

            return run

        def arrive(station: Station, call: Call) -> None:
            lock.arrive((station, call))

        lock: Lockstep[tuple[Station, Call]] = Lockstep([job(batch) for batch in batches])
        entered: list[Station] = []

        def settled(arrived: list[tuple[int, tuple[Station, Call]]]) -> None:
            station = arrived[0][1][0]
            entered[:] = [station]
            self._weights.enter(station)
            found = [Sample(batches[n], masks[n], call) for n, (_, call) in arrived]
            self._visit(station, found, gathering, settle=settle)

        with self._watching(arrive):
            lock.run(lambda p: id(p[0]), settled, lambda: self._weights.leave(entered[0]))

    def _call(self, batch: Batch) -> None:
        run_batch(self._model, batch.values, batch.task, batch.number)

    def _visitor(self, batch: Batch, gathering: set[int]) -> Visit:
        masks = Masks(self._model, batch.values)
        return lambda station, call: self._visit(
            station, [Sample(batch, masks, call)], gathering, settle=False
        )

    @contextmanager
    def _watching(self, visit: Visit) -> Iterator[None]:
        """``visit`` is called before each call of a station."""
        loose, called = self._loose, visit
        calls = nullcontext() if loose is None else loose.calls()
        if loose is not None:

            def visit(station: Station, call: Call) -> None:
                with loose.muted():  # what is looked at is not what the model does
                    called(station, call)

        with calls, hooked([s for s in self.stations if s.called], visit), torch.no_grad():
            yield

    def _watched(self, visit: Visit) -> AbstractContextManager[None]:
        """And before each operation of this thread that no call of a station shows."""
        return nullcontext() if self._loose is None else self._loose.watch(visit)

    def _batches(self, data: Mapping[str, Any]) -> Iterator[Batch]:
        first = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        device = first if self._device is None else torch.device(self._device)
        for task in data:
            for number, batch in enumerate(batches_of(data, task)):
                for n, part in enumerate(without_padding(self._model, batch)):
                    yield Batch(task, number, int(n == 0), to_device(part, device))

    def _visit(
        self, station: Station, samples: Sequence[Sample], gathering: set[int], *, settle: bool
    ) -> None:
        if id(station) not in self._resolved:
            if not any(self._resolve(station, sample, gathering) for sample in samples):
                return
            self._resolved.add(id(station))
        for stage in station.stages:
            pairs = [(site, self._group_of[id(site)]) for site in stage]
            if not station.observed:
                for _, group in pairs:
                    group.calls += sum(s.batch.begins for s in samples)
            wanted = [
                (site, group)
                for site, group in pairs
                if id(group) in gathering and group.settled is None and not group.refused
            ]
            if station.observed:
                taken = {id(site) for site, _ in wanted}
                rest = [pair for pair in pairs if id(pair[0]) not in taken]
                count_uses(rest, station, samples)
                self._visitor_of_sites.in_operations(wanted, station, samples)
            else:
                self._visitor_of_sites.at_call(wanted, station, samples)
            if settle:
                for site, group in pairs:
                    group.settle()
                    for part, value in self.folded(site, group):
                        self._weights.put(station, part, value)
        if self._progress is not None and id(station) not in self._seen:
            self._seen.add(id(station))
            self._progress(len(self._seen), len(self.stations), station.name)

    def _resolve(self, station: Station, sample: Sample, gathering: set[int]) -> bool:
        """Settles what the sites of a module of no known kind are, before it first counts; whether
        the sample told."""
        sites = list(station.sites)
        if station.observed or all(site.known for site in sites):
            return True
        group = self._group_of[id(sites[0])]
        with faults(station.name, sample.task, sample.batch.number, sample.call.again):
            left = resolve(station, sample.call, sample.masks.at(station.module))
        if left is LATER:
            sites[0].unreached = "no sample reaches its weights"
            return False
        if left is None:
            return True
        self.left |= left
        if len(group.sites) > 1:  # tied: one ξ with other layers
            at = next(n for n, site in enumerate(group.sites) if site is sites[0])
            group.sites[at : at + 1] = station.sites
            self._group_of |= {id(site): group for site in station.sites}
            return True
        found = group_sites([station], self._settings)
        at = next(n for n, other in enumerate(self.groups) if other is group)
        self.groups[at : at + 1] = found
        self._group_of |= {id(site): g for g in found for site in g.sites}
        if id(group) in gathering:
            gathering |= {id(g) for g in found}
        return True

    def folded(self, site: Site, group: Group) -> Iterator[tuple[Part, Tensor]]:
        """The calibrated parameters of a site (their rows)."""
        return self._gatherer.folded(site, group)

    def shares_left(self) -> dict[str, float]:
        """Reason → share of the model's floating parameters that ``run`` did not calibrate."""
        return shares_left(self._parameters, self.groups, self.left)

    def factors(self) -> dict[str, tuple[Tensor, int | None]]:
        """Parameter → what multiplies its change: one number, or one for each index of an axis."""
        return factors_of(self.stations, self._group_of)

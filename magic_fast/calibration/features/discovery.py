"""Finds the sites of parameters that are not seen at the call of a known layer: by a first run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from magic_fast.calibration.features.operations.maps import (
    Key,
    Map,
    Shapes,
    key_of,
    maps_of,
    parts_of,
    used_in_changing_rows,
)
from magic_fast.calibration.features.operations.observed import (
    SOMETIMES,
    ObservedSite,
    observe,
    sites_of,
)
from magic_fast.calibration.features.operations.tracked import Tracked
from magic_fast.calibration.features.operations.uses import Use, pieces
from magic_fast.calibration.features.padding import Positions
from magic_fast.calibration.features.sites import Call, Site, Station

_LOG = logging.getLogger("magic_fast")
Visit = Callable[[Station, Call], None]
Stages = list[tuple[Site, ...]]
COMPUTED = "a weight is computed from it before each call"
NOWHERE = "no linear map has it for a parameter"
LATER = {"": "nothing of it was used"}


def resolve(station: Station, call: Call, positions: Positions | None) -> dict[str, str] | None:
    """Finds out, by its first call, what a module of no known kind does with its parameters.

    Its output is affine in them, or operations in it are linear in them: then the station gets the
    sites of those.

    Returns:
        Where it has other sites now, why parameters are in none of them; else None. ``LATER`` where
        the call used none of its parameters, as a stack of experts that no token goes to.
    """
    ((site,),) = station.stages
    if isinstance(station.module, ParametrizationList):  # its output is a weight, no activation
        site.refused = COMPUTED
        return None
    shapes = {p.local: tuple(station.module.get_parameter(p.local).shape) for p in site.parts}
    heavy = any(len(shape) > 1 for shape in shapes.values())
    stages: Stages = []
    left: dict[str, str] = {}
    if heavy:  # noise for whole weights would take several times their memory
        stages, left = _observed(station, site, call, positions, shapes)
    if not stages or left:
        if _affine(station, site, call):
            return None
        if left is LATER:
            site.refused = ""
            return LATER
        if not heavy:
            stages, left = _observed(station, site, call, positions, shapes)
    if not stages:
        return None
    station.stages, station.observed = tuple(stages), True
    return left


def _affine(station: Station, site: Site, call: Call) -> bool:
    like = {
        p.local: x.to(torch.promote_types(x.dtype, torch.float32))
        for p in site.parts
        for x in [p.cut(station.module.get_parameter(p.local).detach())]
    }
    site.try_affine(site.inputs(call), like)
    return not site.refused


def _observed(
    station: Station,
    site: Site,
    call: Call,
    positions: Positions | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Stages, dict[str, str]]:
    """The sites of the operations of a module, a stage for each weight in the order of use, and why
    the other parameters have none."""
    full = {p.local: p.name for p in site.parts}
    try:
        uses, unknown = observe(station.module, call, positions)
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
        _LOG.debug("%s is not observed: %s", station.name, error)
        return [], {}
    if not uses and not unknown:
        return [], LATER
    found, why = _sites(uses, unknown, shapes, full.__getitem__)
    seen = {p.local for sites in found.values() for s in sites.values() for p in s.parts}
    left = {full[n]: why.get(n, NOWHERE) for n in shapes if n not in seen}
    return [tuple(sites.values()) for sites in found.values()], left


def _sites(
    uses: Iterable[Use],
    unknown: Mapping[str, str],
    shapes: Shapes,
    full: Callable[[str], str],
) -> tuple[dict[str, dict[Key, ObservedSite]], dict[str, str]]:
    """Weight → its sites, of parameters that are in linear operations alone; and why others are in
    none."""
    found: dict[str, dict[Key, ObservedSite]] = {}
    why = {name: f"its use in {operation} is no linear map" for name, operation in unknown.items()}
    maps = [one for use in uses for one in maps_of(use)]
    maps = [one for one in maps if not any(piece.name in unknown for piece in one.parts)]
    whole = used_in_changing_rows(maps, shapes)
    for one in maps:
        sites = found.setdefault(next(one.parts).name, {})
        own = sites.get(key_of(one.weight, parts_of(one, shapes, whole)))
        if own is not None and own.has(one):
            continue
        for key, site in sites_of(one, shapes, full, whole):
            if key in sites:
                why |= dict.fromkeys(sites[key].join(site), SOMETIMES)
            else:
                sites[key] = site
    return found, why


def _nothing(*args: Any) -> Any:
    raise AssertionError("a station that is not called")


def look(station: Station, call: Call, positions: Positions | None) -> None:
    """Fills ``call.seen`` with the operations of a module on what it received."""
    shapes = {n: tuple(p.shape) for n, p in station.module.named_parameters(recurse=False)}
    whole = whole_in(station.sites)
    call.seen.clear()
    for use in observe(station.module, call, positions)[0]:
        sort_into(call.seen, use, shapes, whole)


def whole_in(sites: Iterable[Site]) -> set[str]:
    """The parameters that sites have all rows of."""
    return {p.local for site in sites for p in site.parts if p.rows is None}


def sort_into(
    seen: dict[Key, list[Map]],
    use: Use,
    shapes: Mapping[str, tuple[int, ...]],
    whole: Container[str],
) -> None:
    for found in maps_of(use):
        key = key_of(found.weight, parts_of(found, shapes, whole))
        seen.setdefault(key, []).append(found)


class Loose:
    """Parameters that a model uses outside of the calls of the modules that have them.

    Args:
        model: with its weights.
        stations: whose calls are seen anyway.
    """

    def __init__(self, model: nn.Module, stations: Sequence[Station]) -> None:
        self._model, self._all = model, list(stations)
        self._known = [s for s in stations if not isinstance(s.module, ParametrizationList)]
        named = model.named_parameters(remove_duplicate=False)
        self._parameters = {n: p for n, p in named if p.is_floating_point()}
        self._shapes = {n: tuple(p.shape) for n, p in self._parameters.items()}
        self._station_of: dict[Key, Station] = {}
        self._inside = threading.local()
        self._whole: set[str] = set()
        self.called: set[int] = set()

    @property
    def stations(self) -> list[Station]:
        """Those that were found, each once."""
        return list({id(s): s for s in self._station_of.values()}.values())

    def find(self, run: Callable[[], object]) -> None:
        """Looks at one run of the model."""
        uses: list[Use] = []

        def note(use: Use) -> bool:
            if not self._is_own(use):
                uses.append(use)
            return False

        with self.calls(), Tracked(self._parameters, note) as tracked:
            run()
        found, why = _sites(uses, tracked.unknown, self._shapes, str)
        for sites in found.values():  # each is seen by itself, in an operation of its own
            for key, site in sites.items():
                self._station_of[key] = Station(site.name, self._model, ((site,),), True, False)
        self._whole = whole_in(site for station in self.stations for site in station.sites)
        self._leave_out(why)

    def _leave_out(self, why: Mapping[str, str]) -> None:
        """Stations that are not called keep what was not found, each with its reason."""
        found = {p.name for station in self.stations for s in station.sites for p in s.parts}
        for station in self._all:
            if id(station.module) in self.called or station.module is self._model:
                continue
            parts = [p for site in station.sites for p in site.parts if p.name not in found]
            reasons = dict.fromkeys(why[p.name] for p in parts if p.name in why)
            if reasons and found:
                rest = [
                    Site(p.name, (p,), _nothing, _nothing, unreached=why.get(p.name, NOWHERE))
                    for p in parts
                ]
                station.stages, station.called, station.observed = (tuple(rest),), False, True
            elif reasons:
                for site in station.sites:
                    site.unreached = "; ".join(reasons)

    @contextmanager
    def watch(self, visit: Visit) -> Iterator[None]:
        """While a thread has entered it, ``visit`` gets every operation of the thread that was
        found by :meth:`find`; :meth:`calls` is entered for all threads together."""

        def seen(use: Use) -> bool:
            if self._is_own(use):
                return False
            maps: dict[Key, list[Map]] = {}
            sort_into(maps, use, self._shapes, self._whole)
            for key, own in maps.items():
                station = self._station_of.get(key)
                if station is not None:
                    with self.muted():
                        visit(station, Call(self._model, (), {}, {key: own}))
            return bool(maps)

        with Tracked(self._parameters, seen):
            yield

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Operations in here are not the model's."""
        self._stack.append(None)
        try:
            yield
        finally:
            self._stack.pop()

    @property
    def _stack(self) -> list[set[int] | None]:
        """The parameters of the stations whose calls the thread is in; None: it is muted."""
        found: list[set[int] | None] = self._inside.__dict__.setdefault("stack", [])
        return found

    def _is_own(self, use: Use) -> bool:
        """Whether the weight of an operation belongs to a station that is being called."""
        if None in self._stack:
            return True
        first = next(iter(pieces(list(use.args))))
        own = id(self._parameters[first.name])
        return any(own in held for held in self._stack if held is not None)

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Within the calls of stations, operations with their parameters are theirs."""

        def before(module: nn.Module, args: Any) -> None:
            self.called.add(id(module))
            self._stack.append({id(p) for p in module.parameters()})

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        with ExitStack() as hooks:
            for station in self._known:
                for handle in (
                    station.module.register_forward_pre_hook(before),
                    station.module.register_forward_hook(after, always_call=True),
                ):
                    hooks.callback(handle.remove)
            yield

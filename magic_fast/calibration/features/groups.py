"""Sites that share a ξ, and what is known of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from magic_fast.calibration.feature import FeatureCalibration, FeatureGranularity
from magic_fast.calibration.features.sites import Site, Station
from magic_fast.calibration.sensitivity.lists import is_sensitive
from magic_fast.reference.features import Ratios, applied, magnitudes, mean_over_tasks


@dataclass
class Group:
    """Sites whose weights are tied (mostly one site): they have one ξ, from the sums of all uses.

    Attributes:
        sites: in the order of the model's modules.
        settings: of the calibration.
        sensitive: whether it may only shrink.
        calls: how often its sites were called, all batches together.
        settled: the raw ξ, once it is known.
        note: why it has none.
        remarks: what to know of it.
    """

    sites: list[Site]
    settings: FeatureCalibration
    sensitive: bool = False
    calls: int = 0
    settled: Tensor | None = None
    note: str = ""
    remarks: list[str] = field(default_factory=list)
    ratios: dict[str, Ratios] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.sites[0].name

    @property
    def tensors(self) -> list[str]:
        """Names of its parameters, each once."""
        return list(dict.fromkeys(p.name for site in self.sites for p in site.parts))

    @property
    def said(self) -> str:
        """Why it has no ξ, or else what to know of it."""
        remarks = [*(site.remark for site in self.sites), *self.remarks]
        if self.settings.granularity is FeatureGranularity.CHANNEL and not self.per_channel:
            tied = "its weights have several uses"
            why = tied if len(self.sites) > 1 else "none of its axes is known to run over them"
            remarks.append(f"one factor for all channels: {why}")
        return self.note or "; ".join(dict.fromkeys(filter(None, remarks)))

    @property
    def in_operations(self) -> bool:
        """Whether no output of a module shows all of it."""
        return any(type(site) is not Site for site in self.sites)

    @property
    def refused(self) -> str:
        return next((site.refused for site in self.sites if site.refused), "")

    @property
    def per_channel(self) -> bool:
        """Whether each channel has its ξ: one site has the weights, and their axes are known."""
        if self.settings.granularity is not FeatureGranularity.CHANNEL or len(self.sites) > 1:
            return False
        return None not in (self.sites[0].axes or {}).values()

    def add(self, task: str, own: Tensor, merged: Tensor) -> bool:
        """The task features of an expert and of the merged model, [positions, channels]; returns
        whether they are finite."""
        found = self.ratios.get(task)
        if found is None:
            s = self.settings
            found = self.ratios[task] = Ratios(s.reduction.value, s.min_denominator)
        p, each = self.settings.p, self.per_channel
        pair = [magnitudes(x, p, per_channel=each) for x in (own, merged)]
        found.add(*pair)
        return all(bool(x.isfinite().all()) for x in pair)

    def settle(self) -> None:
        """Fixes ξ from what was gathered so far."""
        if self.settled is not None:
            return
        if self.refused:
            self.note = self.refused
        elif not self.ratios:
            self.note = self.sites[0].unreached
        if self.note:
            self.settled = torch.tensor(math.nan, dtype=torch.float64)
            return
        self.settled = mean_over_tasks(list(self.by_task().values()))
        if not bool(torch.isfinite(self.settled).any()):
            self.note = "the merged model's features are the base's"

    def by_task(self) -> dict[str, Tensor]:
        return {task: ratios.coefficient() for task, ratios in self.ratios.items()}

    def factor(self) -> Tensor:
        """What multiplies the group's task vector: float64 [] or [channels]; 1 where ξ is
        undefined."""
        assert self.settled is not None
        if self.note:
            return torch.ones((), dtype=torch.float64)
        s = self.settings
        value = applied(self.settled, sensitive=self.sensitive, strength=s.strength, clamp=s.clamp)
        return torch.where(torch.isfinite(self.settled), value * s.scale, value)


def group_sites(stations: Sequence[Station], settings: FeatureCalibration) -> list[Group]:
    """Groups of sites, those together that share a parameter."""
    chosen = set(settings.sensitive or ())
    owner: dict[object, Group] = {}
    keys_of: dict[int, list[object]] = {}
    groups: dict[int, Group] = {}
    pooled = _used_whole_and_in_rows(stations)
    for station in stations:
        for site in station.sites:
            names = {site.name, station.name, *(p.name for p in site.parts)}
            held = any(is_sensitive(name, chosen) for name in names)
            group = Group([site], settings, sensitive=held)
            # rows of one parameter are apart, whole parameters are themselves
            own = [(id(station.module.get_parameter(p.local)), str(p.rows)) for p in site.parts]
            keys = [(key, "" if key in pooled else rows) for key, rows in own]
            keys_of[id(group)] = [*keys]
            for other in {id(owner[k]): owner[k] for k in keys if k in owner}.values():
                group.sites = [*other.sites, *group.sites]
                group.sensitive |= other.sensitive
                keys_of[id(group)] += keys_of.pop(id(other))
                del groups[id(other)]
            groups[id(group)] = group
            owner |= dict.fromkeys(keys_of[id(group)], group)
    return list(groups.values())


def _used_whole_and_in_rows(stations: Sequence[Station]) -> set[int]:
    """The parameters that some sites have whole and others rows of."""
    found: dict[int, set[bool]] = {}
    for station in stations:
        for part in (p for site in station.sites for p in site.parts):
            key = id(station.module.get_parameter(part.local))
            found.setdefault(key, set()).add(part.rows is None)
    return {key for key, ways in found.items() if len(ways) > 1}

"""Modules and state dicts of one architecture as the models of a calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.api.modules.state import copied
from magic_fast.api.results import CalibrationReport
from magic_fast.api.tensors.calibrate_weights import calibrate_weights
from magic_fast.api.tensors.merge import merge
from magic_fast.api.tensors.models import Named, labelled, state_dict_of
from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.calibration.feature import Deploy, FeatureCalibration
from magic_fast.calibration.features.hooks import hook_station
from magic_fast.calibration.features.run import FeatureRun
from magic_fast.calibration.features.sites import Part, Station
from magic_fast.errors import InputError

State = Mapping[str, Tensor]


class InMemory:
    """Modules and state dicts as the weights of a run.

    Args:
        base: module or state dict.
        experts: a list or a mapping of them; may be none where ``merged`` is given.
        merged: module or state dict; None: the average of the experts, in float32.
        model: what runs, where ``merged`` is no module.
        out: what runs and takes the result: ``merged`` itself, or another module; None: a copy.
    """

    streamed = False
    resident = True

    def __init__(
        self,
        base: Any,
        experts: Any,
        merged: Any,
        model: nn.Module | None,
        out: nn.Module | None = None,
    ) -> None:
        self.names: list[str] | None = None
        if isinstance(experts, Mapping):
            if any(isinstance(v, Tensor) for v in experts.values()):
                raise InputError("experts: expected a list of models, got one state dict.")
            self.names, experts = list(experts), list(experts.values())
        if experts is None and merged is not None:
            experts = []
        if not isinstance(experts, Sequence) or isinstance(experts, str):
            raise InputError(
                f"experts: expected a list of modules or state dicts, got {type(experts).__name__}."
            )
        if out is not None and not isinstance(out, nn.Module):
            raise InputError(
                f"out: expected a module that takes the result, got {type(out).__name__}."
            )
        structure = next((m for m in (merged, model, out) if isinstance(m, nn.Module)), None)
        if not isinstance(structure, nn.Module):
            raise InputError(
                "merged: expected a module, whose layers can be run, got "
                f"{type(merged).__name__}. Pass a module of the architecture as model=."
            )
        self._structure = structure
        self._as_state = not isinstance(merged, nn.Module)
        self.start = _state(base, "base")
        self.experts = [_state(e, f"experts[{k}]") for k, e in enumerate(experts)]
        if merged is None:
            room = wide_like(self.start)
            self.end: State = merge(self.start, self.experts, "average", out=room)
        else:
            self.end = _state(merged, "merged")
        rows = labelled(self.start, self.experts)
        if self._as_state and structure is not out:
            rows.append(("model", _state(structure, "model")))
        if out is not None and out is not merged:
            rows.append(("out", _state(out, "out")))
        self._table = Named([("merged", self.end), *rows])
        self.start, *others = self._table.models[1:]
        self.experts = others[: len(self.experts)]
        for name in self._table.names:
            own = self.end[name]
            for (what, _), other in zip(rows, self._table.row(name)[1:], strict=True):
                if other.shape != own.shape:
                    raise InputError(
                        f"shape of '{name}' in {what}: expected {tuple(own.shape)} as in merged, "
                        f"got {tuple(other.shape)}. All models must have the same architecture."
                    )
        self._out, self._work = out, out
        self._rough: State | None = None
        self._in_place = out is not None and out is merged
        self._written: set[tuple[int, str]] = set()
        if out is not None:
            _check_room(out, merged, rows, self.end)

    def check(self, settings: FeatureCalibration, *, exact: bool) -> None:
        if exact:  # the authors' rule is a substring
            modules = self._structure.named_modules()
            parameters = self._structure.named_parameters(remove_duplicate=False)
            settings.check_names(name for name, _ in chain(modules, parameters))

    def calibrate_weights(
        self,
        calibration: str | WeightCalibration | Mapping[str, Any],
        sensitive: tuple[str, ...] | None,
    ) -> CalibrationReport:
        """WSC of the merged weights, kept in float32 for what follows."""
        settings = as_calibration(calibration)
        if settings is None:
            raise InputError("weight_calibration: expected 'wsc' or settings, got None.")
        if sensitive is not None and settings.sensitive is None:
            settings = replace(settings, sensitive=sensitive)
        config = getattr(self._structure, "config", None)
        calibrated, report = calibrate_weights(
            self.start, self.experts, self.end, calibration=settings, out=wide_like(self.end),
            model_type=getattr(config, "model_type", None),
        )  # fmt: skip
        self._rough, self.end = self.end, calibrated
        self._in_place = False
        return report

    @contextmanager
    def working(self, *, wide: bool = False) -> Iterator[nn.Module]:
        """The merged model, in ``out`` or a copy, in evaluation mode while it is worked on;
        ``wide``: in float32."""
        work = copied(self._structure) if self._out is None else self._out
        self._work = work
        trainable = {n: p.requires_grad for n, p in work.named_parameters()}
        work.requires_grad_(False)
        config = getattr(work, "config", None)
        cached = getattr(config, "use_cache", None)
        if cached:
            config.use_cache = False  # type: ignore[union-attr]
        training = {name: m.training for name, m in work.named_modules()}
        if wide:
            _widen(work, self.end)
        elif not self._has_end(work):
            work.load_state_dict(self.end)
        work.eval()
        try:
            yield work
        finally:
            for name, module in work.named_modules():
                module.training = training.get(name, module.training)
            for name, parameter in work.named_parameters():
                parameter.requires_grad_(trainable[name])
            if cached:
                config.use_cache = cached  # type: ignore[union-attr]

    def _has_end(self, work: nn.Module) -> bool:
        """Whether the module has the merged values already: it is, or was copied from, merged."""
        same = self._out is None or work is self._structure
        return same and not self._as_state and self._rough is None

    def deploy(self, run: FeatureRun, how: Deploy) -> None:
        groups = {id(site): g for g in run.groups for site in g.sites}
        for station in run.stations:
            for site in station.sites:
                for part, value in run.folded(site, groups[id(site)]):
                    if how is Deploy.HOOKS:
                        value = part.cut(self.merged(part.name))
                    self.put(station, part, value)
        if how is Deploy.HOOKS:
            for station in run.stations:
                hook_station(station, groups, self.base, lambda s: run.folded(s, groups[id(s)]))

    def result(self, how: Deploy) -> Any:
        assert self._work is not None
        if self._as_state and self._out is None and how is Deploy.FOLD:
            return {n: t.detach() for n, t in self._work.state_dict().items()}
        return self._work

    def base(self, name: str) -> Tensor:
        return self._placed(self.start, name)

    def expert(self, number: int, name: str, rows: slice | None = None) -> Tensor:
        own = self._placed(self.experts[number], name)
        return own if rows is None else own[rows]

    def merged(self, name: str) -> Tensor:
        return self._placed(self.end, name)

    def _placed(self, state: State, name: str) -> Tensor:
        assert self._work is not None
        return state[name].detach().to(self._work.get_parameter(name).device)

    def scratch(self, key: object, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device=like.device)

    def enter(self, station: Station) -> None:
        pass

    def leave(self, station: Station) -> None:
        pass

    def put(self, station: Station, part: Part, value: Tensor) -> None:
        parameter = station.module.get_parameter(part.local)
        if self._in_place:  # what is read as merged is what is written: once
            key = (id(parameter), str(part.rows))
            if key in self._written:
                return
            self._written.add(key)
        part.cut(parameter.detach()).copy_(value)


def _check_room(out: nn.Module, merged: Any, inputs: Sequence[tuple[str, Any]], end: State) -> None:
    """Refuses a module that the result does not fit into, or whose memory is still to be read."""
    places: dict[str, Tensor] = dict(out.named_parameters(remove_duplicate=False))
    if out is not merged:
        places |= dict(out.named_buffers())
    for name, place in places.items():
        if name in end and place.dtype != end[name].dtype:
            raise InputError(
                f"dtype of '{name}' in out: expected {end[name].dtype} as in merged, got "
                f"{place.dtype}. Convert the module first."
            )
    own = {p.untyped_storage().data_ptr(): name for name, p in places.items() if p.numel()}
    others = [(what, state) for what, state in inputs if what not in ("out", "model")]
    if out is not merged:
        others.append(("merged", end))
    for what, state in others:
        for name, tensor in state.items():
            taken = own.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
            if taken is not None:
                raise InputError(
                    f"tensor '{taken}' of out: expected memory of its own, got that of '{name}' "
                    f"in {what}, which is still to be read. Pass another module."
                )


def _widen(work: nn.Module, state: State) -> None:
    """The values of ``state`` in the module, floating ones in float32 (float64 where they are)."""
    tensors = dict(work.named_parameters()) | dict(work.named_buffers())
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            value = state.get(name, tensor).detach()
            wide = torch.promote_types(value.dtype, torch.float32)
            tensor.data = value.to(tensor.device, wide, copy=True)
        elif name in state:
            tensor.data.copy_(state[name])


def wide_like(state: State) -> dict[str, Tensor]:
    """Room for a model in float32 (float64 where it is)."""
    return {
        n: torch.empty_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
        if t.is_floating_point()
        else torch.empty_like(t)
        for n, t in state.items()
    }


def _state(value: Any, what: str) -> State:
    state = state_dict_of(value, what)
    if isinstance(state, Tensor):
        raise InputError(f"{what}: expected a module or a state dict, got a tensor.")
    return state

"""``calibrate_features``: FSC and DSC on a model that any other tool merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.api.calibrate import calibrate_weights
from magic_fast.api.results import CalibrationReport, LayerCalibration
from magic_fast.api.tensors import Named, state_dict_of
from magic_fast.calibration import WeightCalibration
from magic_fast.calibration.batches import experts_by_task
from magic_fast.calibration.feature import Deploy, FeatureCalibration
from magic_fast.calibration.feature_hooks import hook_station
from magic_fast.calibration.feature_magic import calibrate_like_magic
from magic_fast.calibration.feature_run import FeatureRun
from magic_fast.calibration.sites import Part, Station
from magic_fast.calibration.weight import word
from magic_fast.errors import InputError

State = Mapping[str, Tensor]


def calibrate_features(
    base: Any,
    experts: Any,
    merged: Any,
    data: Mapping[str, Any],
    *,
    model: nn.Module | None = None,
    space: str = "feature",
    reduction: str = "ratio_of_sums",
    deploy: str = "fold",
    p: float = 1,
    granularity: str = "layer",
    sequential: bool = False,
    clamp: tuple[float, float] | None = (0.1, 10.0),
    strength: float = 1.0,
    scale: float = 1.0,
    min_denominator: float = 0.0,
    sensitive: Sequence[str] | None = None,
    weight_calibration: str | WeightCalibration | Mapping[str, Any] = "wsc",
    preset: str = "default",
) -> tuple[Any, CalibrationReport]:
    """The merged model with the magnitudes of its task features restored, layer by layer: FSC of
    MAGIC, arXiv 2512.19320 (docs/calibration.md).

    For a layer l with input z, what it receives when the merged model runs on samples of task k:
    ξ_k = Σ‖f(z; θ_k) − f(z; θ_0)‖_p ÷ Σ‖f(z; θ_m) − f(z; θ_0)‖_p, ξ = mean of ξ_k over the tasks
    where it is finite, and the layer's weights become θ_0 + ξ·(θ_m − θ_0). Layers are linear maps:
    linear layers, convolutions, embeddings, norms, the projections of ``nn.MultiheadAttention``.
    Tied weights and repeated calls share one ξ, from the sums over all uses. Padding (a 2-D
    ``attention_mask`` in a batch) does not count.

    Args:
        base: module or state dict.
        experts: K of them, or a mapping of task names to them.
        merged: the module to calibrate, or its state dict with ``model``. Nothing is written to it.
        data: task → batches: an iterable of them, or a callable that gives one. The model is called
            with ``**batch`` for a mapping, ``*batch`` for a tuple or list, else with ``batch``.
            Tasks belong to ``experts`` by name where that is a mapping, else in order. Iterators
            are read once; ``sequential`` holds all batches.
        model: a module of the architecture, where ``merged`` is a state dict.
        space: ``feature`` (FSC), or ``dual`` (DSC): WSC first, then FSC on its result.
        reduction: ``ratio_of_sums``, or ``mean`` or ``median`` of the ratios of single positions.
        deploy: ``fold`` into the weights; ``hooks`` keeps the base's beside them: the same outputs
            at twice the cost, to compare.
        p: norm along the features: an integer ≥ 1 or ``"inf"``.
        granularity: one ξ for a ``layer``, or for each output ``channel`` (where its weights are
            not tied).
        sequential: take layers in order, z coming from the already calibrated ones. What has
            several uses takes its ξ from a first run instead.
        clamp: (low, high) for ξ, or None.
        strength: exponent of ξ.
        scale: factor on calibrated layers besides ξ.
        min_denominator: for ``mean`` and ``median``: positions whose merged task feature is smaller
            than this share of its mean over the batch do not count.
        sensitive: names of tensors (or, for ``space="feature"``, modules) whose layers may only
            shrink. In ``dual`` it is the list of WSC too, which lets all others only grow there.
        weight_calibration: of ``dual``: ``"wsc"`` or settings.
        preset: ``magic``: what the authors' code does (ratio per position, every leaf, whole
            attentions): with ``deploy="hooks"`` only.

    Returns:
        (calibrated, report): a new module, in the mode and dtypes of ``merged`` (a state dict where
        that was one). The report's ``layers`` have ξ, by task too, and why a layer has none.

    Raises:
        InputError: names or shapes differ, a task has no data or no expert, a batch is empty or not
            what the model takes, an unknown sensitive name.

    >>> base, expert, merged = (nn.Linear(1, 1, bias=False) for _ in range(3))
    >>> for layer, weight in ((base, 0.0), (expert, 3.0), (merged, 0.5)):
    ...     _ = nn.init.constant_(layer.weight, weight)
    >>> found, report = calibrate_features(base, [expert], merged, {"a": [torch.ones(4, 1)]})
    >>> found.weight.item(), report.layers[0].coefficient.item()
    (3.0, 6.0)
    """
    if preset not in ("default", "magic"):
        raise InputError(f"preset: expected 'default' or 'magic', got {preset!r}.")
    if space not in ("feature", "dual"):
        raise InputError(f"space: expected 'feature' or 'dual', got {space!r}.")
    how = Deploy(word(Deploy, deploy, "deploy"))
    settings = FeatureCalibration(
        reduction,  # type: ignore[arg-type]
        p,
        granularity,  # type: ignore[arg-type]
        sequential,
        clamp,
        strength,
        scale,
        min_denominator,
        None
        if sensitive is None
        else sensitive
        if isinstance(sensitive, str)
        else tuple(sensitive),  # type: ignore[arg-type]
    )
    weights = _InMemory(base, experts, merged, model)
    report = CalibrationReport()
    if space == "dual":
        report = weights.calibrate_weights(weight_calibration, settings.sensitive)
    weights.check(settings, exact=preset == "default")
    with weights.working() as work:
        if preset == "magic":
            if how is not Deploy.HOOKS:
                raise InputError(
                    "deploy: expected 'hooks' under preset 'magic', got 'fold'. "
                    "Its ratios per position cannot be folded into weights."
                )
            layers = calibrate_like_magic(
                work, weights.start, weights.experts, data, p=settings.p,
                sensitive=settings.sensitive,
            )  # fmt: skip
            report.layers = [
                LayerCalibration(x.name, [], x.ratio, x.ratio, x.by_task) for x in layers
            ]
        else:
            tasks = experts_by_task(len(weights.experts), weights.names, list(data))
            run = FeatureRun(work, weights, dict(zip(data, tasks, strict=True)), settings)
            run.run(data)
            report.layers = layers_of(run)
            weights.deploy(run, how)
    return weights.result(how), report


def layers_of(run: FeatureRun) -> list[LayerCalibration]:
    """What was found of every layer, and the parameters that are in none."""
    found = [
        LayerCalibration(
            g.name,
            g.tensors,
            None if g.note else g.settled,
            g.factor(),
            {} if g.note else g.by_task(),
            g.calls,
            sum(r.positions for r in g.ratios.values()),
            g.note,
        )
        for g in run.groups
    ]
    one = torch.ones((), dtype=torch.float64)
    return found + [
        LayerCalibration(name, [name], None, one, note=why) for name, why in run.left.items()
    ]


class _InMemory:
    """Modules and state dicts as the weights of a run."""

    streamed = False

    def __init__(self, base: Any, experts: Any, merged: Any, model: nn.Module | None) -> None:
        self.names: list[str] | None = None
        if isinstance(experts, Mapping):
            if any(isinstance(v, Tensor) for v in experts.values()):
                raise InputError("experts: expected a list of models, got one state dict.")
            self.names, experts = list(experts), list(experts.values())
        if not isinstance(experts, Sequence) or isinstance(experts, str):
            raise InputError(
                f"experts: expected a list of modules or state dicts, got {type(experts).__name__}."
            )
        structure = merged if isinstance(merged, nn.Module) else model
        if not isinstance(structure, nn.Module):
            raise InputError(
                "merged: expected a module, whose layers can be run, got "
                f"{type(merged).__name__}. Pass a module of the architecture as model=."
            )
        self._structure = structure
        self._as_state = not isinstance(merged, nn.Module)
        self.end = _state(merged, "merged")
        self.start = _state(base, "base")
        self.experts = [_state(e, f"experts[{k}]") for k, e in enumerate(experts)]
        rows = [("base", self.start), *((f"experts[{k}]", e) for k, e in enumerate(self.experts))]
        self._table = Named([("merged", self.end), *rows])
        for name in self._table.names:
            own = self.end[name]
            for (what, _), other in zip(rows, self._table.row(name)[1:], strict=True):
                if other.shape != own.shape:
                    raise InputError(
                        f"shape of '{name}' in {what}: expected {tuple(own.shape)} as in merged, "
                        f"got {tuple(other.shape)}. All models must have the same architecture."
                    )
        self._work: nn.Module | None = None
        self._rough: State | None = None

    def check(self, settings: FeatureCalibration, *, exact: bool) -> None:
        if exact:  # the authors' rule is a substring
            modules = (name for name, _ in self._structure.named_modules())
            parameters = (n for n, _ in self._structure.named_parameters(remove_duplicate=False))
            settings.check_names(modules, parameters)

    def calibrate_weights(
        self,
        calibration: str | WeightCalibration | Mapping[str, Any],
        sensitive: tuple[str, ...] | None,
    ) -> CalibrationReport:
        """WSC of the merged weights, kept in float32 for what follows."""
        from dataclasses import replace

        from magic_fast.calibration import as_calibration

        settings = as_calibration(calibration)
        if settings is None:
            raise InputError("weight_calibration: expected 'wsc' or settings, got None.")
        if sensitive is not None and settings.sensitive is None:
            settings = replace(settings, sensitive=sensitive)
        wide = {
            n: torch.empty_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
            if t.is_floating_point()
            else torch.empty_like(t)
            for n, t in self.end.items()
        }
        config = getattr(self._structure, "config", None)
        calibrated, report = calibrate_weights(
            self.start, self.experts, self.end, calibration=settings, out=wide,
            model_type=getattr(config, "model_type", None),
        )  # fmt: skip
        self._rough, self.end = self.end, calibrated
        return report

    @contextmanager
    def working(self) -> Iterator[nn.Module]:
        """A copy of the merged model, in evaluation mode while it is worked on."""
        work = self._work = copy.deepcopy(self._structure).requires_grad_(False)
        config = getattr(work, "config", None)
        cached = getattr(config, "use_cache", None)
        if cached:
            config.use_cache = False  # type: ignore[union-attr]
        training = {name: m.training for name, m in work.named_modules()}
        if self._as_state or self._rough is not None:
            work.load_state_dict(self.end)
        work.eval()
        try:
            yield work
        finally:
            for name, module in work.named_modules():
                module.training = training.get(name, module.training)
            if cached:
                config.use_cache = cached  # type: ignore[union-attr]

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
                hook_station(station, groups, self.base)

    def result(self, how: Deploy) -> Any:
        assert self._work is not None
        trainable = {n: x.requires_grad for n, x in self._structure.named_parameters()}
        for name, parameter in self._work.named_parameters():
            parameter.requires_grad_(trainable[name])
        if self._as_state and how is Deploy.FOLD:
            return {n: t.detach() for n, t in self._work.state_dict().items()}
        return self._work

    def base(self, name: str) -> Tensor:
        return self._placed(self.start, name)

    def expert(self, number: int, name: str) -> Tensor:
        return self._placed(self.experts[number], name)

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
        part.cut(station.module.get_parameter(part.local).detach()).copy_(value)


def _state(value: Any, what: str) -> State:
    state = state_dict_of(value, what)
    if isinstance(state, Tensor):
        raise InputError(f"{what}: expected a module or a state dict, got a tensor.")
    return state

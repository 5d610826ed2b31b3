"""``calibrate_features``: FSC and DSC on a model that any other tool merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from magic_fast.api.results import FeatureReport, LayerCalibration
from magic_fast.api.tensors.feature_weights import InMemory
from magic_fast.calibration import WeightCalibration
from magic_fast.calibration.feature import Deploy, FeatureCalibration
from magic_fast.calibration.features.batches import experts_by_task
from magic_fast.calibration.features.inputs import called_with
from magic_fast.calibration.features.left import warnings_of
from magic_fast.calibration.features.magic import calibrate_like_magic
from magic_fast.calibration.features.run import FeatureRun
from magic_fast.calibration.values import word
from magic_fast.errors import InputError


def calibrate_features(
    base: Any,
    experts: Any,
    merged: Any,
    data: Mapping[str, Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    model: nn.Module | None = None,
    out: nn.Module | None = None,
    space: str = "feature",
    reduction: str = FeatureCalibration.reduction.value,
    deploy: str = "fold",
    p: float = FeatureCalibration.p,
    granularity: str = FeatureCalibration.granularity.value,
    sequential: bool = FeatureCalibration.sequential,
    clamp: tuple[float, float] | None = FeatureCalibration.clamp,
    strength: float = FeatureCalibration.strength,
    scale: float = FeatureCalibration.scale,
    min_denominator: float = FeatureCalibration.min_denominator,
    sensitive: Sequence[str] | None = None,
    weight_calibration: str | WeightCalibration | Mapping[str, Any] = "wsc",
    preset: str = "default",
) -> tuple[Any, FeatureReport]:
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
        merged: the module to calibrate, or its state dict with ``model``. Nothing is written to it,
            unless it is ``out``.
        data: task → batches: an iterable of them, or a callable that gives one. The model is called
            with ``**batch`` for a mapping, with ``batch`` for one tensor or value. Of a tuple or
            list it gets the arguments that its ``forward`` requires; more, which may be labels,
            never fill optional ones but are left with a warning, and what its ``forward`` cannot
            take is refused: ``inputs`` says what is meant. Tasks belong to
            ``experts`` by name where that is a mapping, else in order. Iterators are read once;
            ``sequential`` holds all batches.
        inputs: a function from a batch, as a loader yields it, to what the model is called with:
            a mapping, a tuple, or one value. ``inputs=lambda batch: batch[0]`` leaves labels out.
        model: a module of the architecture, where ``merged`` is a state dict.
        out: the module that is run and takes the result: ``merged`` itself, of which no copy is
            made then, or another one of its names, shapes and dtypes, whose memory no input has.
            After an error it may be half written. Default: a copy of ``merged``.
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
        sensitive: names of tensors or modules whose layers may only shrink. In ``dual`` it is the
            list of WSC too, which lets all others only grow there.
        weight_calibration: of ``dual``: ``"wsc"`` or settings.
        preset: ``magic``: what the authors' code does (ratio per position, every leaf, whole
            attentions): with ``deploy="hooks"`` only.

    Returns:
        (calibrated, report): ``out``, or a new module, in the mode and dtypes of ``merged`` (a
        state dict where that was one). The report's ``layers`` have ξ, by task too, and why a layer
        has none; ``left`` has the share of the model's parameters that are not calibrated, by
        reason (none under preset ``magic``); above 10 % ``warnings`` and the log say so.

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
        sensitive,  # type: ignore[arg-type]
    )
    if how is Deploy.HOOKS and sequential and out is not None and out is merged:
        raise InputError(
            "out: expected another module than merged with deploy 'hooks' and sequential, which "
            "need its values as they were, got merged. Leave it out."
        )
    weights = InMemory(base, experts, merged, model, out)
    report = FeatureReport()
    if space == "dual":
        report.tensors = weights.calibrate_weights(weight_calibration, settings.sensitive).tensors
    weights.check(settings, exact=preset == "default")
    with weights.working() as work:
        batches = called_with(data, inputs, work, report.warnings)
        if preset == "magic":
            if how is not Deploy.HOOKS:
                raise InputError(
                    "deploy: expected 'hooks' under preset 'magic', got 'fold'. "
                    "Its ratios per position cannot be folded into weights."
                )
            layers = calibrate_like_magic(
                work, weights.start, weights.experts, batches, p=settings.p,
                sensitive=settings.sensitive,
            )  # fmt: skip
            report.layers = [
                LayerCalibration(x.name, [], x.ratio, x.ratio, x.by_task) for x in layers
            ]
        else:
            tasks = experts_by_task(len(weights.experts), weights.names, list(data))
            run = FeatureRun(work, weights, dict(zip(data, tasks, strict=True)), settings)
            run.run(batches)
            take_features(run, report)
            weights.deploy(run, how)
    return weights.result(how), report


def take_features(run: FeatureRun, report: FeatureReport) -> None:
    """What was found of every layer, the parameters that are in none, and how much is left."""
    found = [
        LayerCalibration(
            g.name,
            g.tensors,
            None if g.note else g.settled,
            g.factor(),
            {} if g.note else g.by_task(),
            g.calls,
            sum(r.positions for r in g.ratios.values()),
            g.said,
        )
        for g in run.groups
    ]
    one = torch.ones((), dtype=torch.float64)
    report.layers = found + [
        LayerCalibration(name, [name], None, one, note=why) for name, why in run.left.items()
    ]
    report.left = run.shares_left()
    report.warnings[:0] = warnings_of(report.left)

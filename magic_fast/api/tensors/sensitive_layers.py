"""``sensitive_layers``: which layers a merged model must not grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from magic_fast.api.tensors.feature_weights import InMemory, wide_like
from magic_fast.api.tensors.merge import merge
from magic_fast.api.tensors.models import Named, models_of, state_dict_of
from magic_fast.calibration import SensitivityReport, TensorFilter
from magic_fast.calibration.features.inputs import called_with
from magic_fast.calibration.sensitivity.divergence import Divergences
from magic_fast.calibration.sensitivity.lists import TOP
from magic_fast.calibration.sensitivity.measure import (
    Change,
    Probe,
    Progress,
    Unit,
    evaluated_scores,
    in_place,
    in_state,
)
from magic_fast.errors import InputError
from magic_fast.reference.sensitivity import enlarged


def sensitive_layers(
    base: Any,
    experts: Any,
    evaluate: Callable[[Any], Any] | None = None,
    *,
    data: Mapping[str, Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    merged: Any = None,
    model: nn.Module | None = None,
    by: str = "tensor",
    perturbation: float = 1.1,
    top: int = TOP,
    tensors: str | TensorFilter | Sequence[str] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    together: int | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> SensitivityReport:
    """The layers that lose most when their part of the merged task vector grows: what
    ``sensitive=`` of a calibration takes (MAGIC, arXiv 2512.19320; docs/calibration.md).

    Each tensor l alone becomes θ_0 + perturbation·(θ_m − θ_0), all others stay θ_m, and the model
    is evaluated. Two measures; give one:

    * ``evaluate``, the authors': any function of the model, higher is better, as accuracy on
      labelled samples. Where it returns one score for each sample, the list is tested.
    * ``data``, without labels: −KL(outputs of θ_m ‖ outputs of the enlarged one), in float64, the
      mean over a sample's positions without padding, then over samples.

    The lowest scores are the sensitive layers. A list may be noise: the report's ``noise`` says so
    where no layer of it loses more than the median one beyond chance (simultaneous intervals from
    a wild bootstrap over samples).

    Args:
        base: module or state dict.
        experts: K of them, or a mapping of names to them; None where ``merged`` is given.
        evaluate: gets the model in float32 (bfloat16 cannot tell a tenth of a task vector apart),
            in evaluation mode, on its device; a state dict where no module was given. It returns a
            number, or one for each sample (list or 1-D tensor), the same samples each time.
        data: task → batches, as :func:`calibrate_features` takes them.
        inputs: from a batch to what the model is called with, as of :func:`calibrate_features`.
        merged: module or state dict; None: the average of the experts.
        model: a module of the architecture, where all others are state dicts.
        by: enlarge one ``tensor`` at a time, or those that a ``module`` itself holds.
        perturbation: the factor on a layer's task vector.
        top: how many layers are called sensitive.
        tensors: which: names, ``"general"``, ``"magic"`` or a :class:`TensorFilter` as in
            :class:`WeightCalibration`; None: all floating parameters.
        output: from what the model returns to its logits [samples, …, classes]; None: its
            ``logits`` or ``logits_per_image``, or the tensor that it returns.
        together: how many layers are enlarged in one call of the model, where it allows
            (``torch.vmap``); None: as many as fit in 256 MiB; 1: one after another. The numbers
            are the same to rounding.
        resamples, confidence, seed: of the intervals.
        progress: called after each evaluation.

    Raises:
        InputError: neither or both measures; names or shapes differ; no data, an empty batch, or
            not what the model takes; scores that are no numbers; unknown tensors.

    >>> import torch
    >>> base, expert = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> for layer, size in ((base, 0.0), (expert, 1.0)):
    ...     _ = [nn.init.constant_(p, size) for p in layer.parameters()]
    >>> report = sensitive_layers(base, [expert], lambda m: -m(torch.ones(1, 2)).item(), top=1)
    >>> report.sensitive, {name: round(score, 1) for name, score in report.scores.items()}
    (('weight',), {'weight': -3.2, 'bias': -3.1})
    """
    probe = Probe(by, perturbation, top, tensors, together, resamples, confidence, seed)
    if evaluate is not None and not callable(evaluate):
        raise InputError(
            "evaluate: expected a function of the model, got "
            f"{type(evaluate).__name__}. Batches of each task go to data=."
        )
    if (evaluate is None) == (data is None):
        raise InputError(
            "evaluate, data: expected one of them, got "
            f"{'neither' if data is None else 'both'}. A function of the model gives the authors' "
            "measure; batches of each task give the divergence, which needs no labels."
        )
    if data is not None and (not isinstance(data, Mapping) or not data):
        raise InputError(
            "data: expected batches of at least one task, as {task: batches}, got "
            f"{'none' if isinstance(data, Mapping) else type(data).__name__}."
        )
    for word, value in (("inputs", inputs), ("output", output)):
        if evaluate is not None and value is not None:
            raise InputError(f"{word}: expected it with data, got it with evaluate. Leave it out.")
    structure = next((m for m in (model, merged, base) if isinstance(m, nn.Module)), None)
    if structure is None:
        if evaluate is None:
            raise InputError(
                "model: expected a module that runs the data, got state dicts alone. Pass a module "
                "of the architecture as model=."
            )
        return _of_states(base, experts, merged, evaluate, probe, progress)
    weights = InMemory(base, experts, merged, structure)
    with weights.working(wide=True) as work:

        def change(name: str) -> Tensor:
            return enlarged(weights.base(name), weights.merged(name), perturbation)

        said: list[str] = []
        batches = None if data is None else called_with(data, inputs, work, said)
        report = probe_module(work, change, probe, evaluate, batches, output, progress)
        report.warnings += said
        return report


def probe_module(
    work: nn.Module,
    change: Change,
    probe: Probe,
    evaluate: Callable[[Any], Any] | None = None,
    data: Mapping[str, Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    progress: Progress | None = None,
    stored: Mapping[str, str] | None = None,
) -> SensitivityReport:
    """By a module that may be written to, in evaluation mode; ``stored``: its names in a
    checkpoint, which the report has then."""
    own_names = {(stored or {}).get(n, n): n for n, _ in work.named_parameters()}
    floating = {n: work.get_parameter(own) for n, own in own_names.items()}
    units = [
        Unit(unit.name, tuple(own_names[n] for n in unit.tensors))
        for unit in probe.units({n: p for n, p in floating.items() if p.is_floating_point()})
    ]
    if evaluate is None:
        assert data is not None
        run = Divergences(work, change, units, output, probe.together, progress)
        scores = run.run(data)
        return probe.report(units, scores.new_zeros(()), scores, "kl")
    own = evaluate

    def changed(unit: Unit) -> Any:
        with in_place(work, change, unit) as model:
            return own(model)

    plain, scores = evaluated_scores(lambda: own(work), changed, units, progress)
    return probe.report(units, plain, scores, "evaluate")


def _of_states(
    base: Any,
    experts: Any,
    merged: Any,
    evaluate: Callable[[Any], Any],
    probe: Probe,
    progress: Progress | None,
) -> SensitivityReport:
    """By a function of state dicts: no module is there."""
    start = state_dict_of(base, "base")
    models: list[Any] = []
    if experts is not None or merged is None:
        own = list(experts.values()) if isinstance(experts, Mapping) else experts
        models = models_of(own, "experts")
    if isinstance(start, Tensor):
        raise InputError("base: expected a module or a state dict, got a tensor.")
    if merged is None:
        end: Any = merge(start, models, "average", out=wide_like(start))
    else:
        end = state_dict_of(merged, "merged")
    Named([("base", start), ("merged", end), *((f"experts[{k}]", e) for k, e in enumerate(models))])
    end = {n: t.to(w.dtype) for (n, t), w in zip(end.items(), wide_like(end).values(), strict=True)}
    units = probe.units({n: t for n, t in end.items() if t.is_floating_point()})

    def change(name: str) -> Tensor:
        return enlarged(start[name], end[name], probe.perturbation)

    plain, scores = evaluated_scores(
        lambda: evaluate(end),
        lambda unit: evaluate(in_state(end, change, unit)),
        units,
        progress,
    )
    return probe.report(units, plain, scores, "evaluate")

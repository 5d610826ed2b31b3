"""``merge_by_data``: RegMean and Fisher merging of modules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from magic_fast.api.data.settings import DataMergeReport, DataMethod, left_text
from magic_fast.api.modules.state import as_state_dict, with_values
from magic_fast.api.tensors.feature_weights import InMemory, wide_like
from magic_fast.api.tensors.merge import merge
from magic_fast.api.tensors.models import state_dict_of, tied_groups
from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.calibration.features.batches import experts_by_task
from magic_fast.calibration.features.run import FeatureRun
from magic_fast.calibration.statistics.gradients import diagonal_fisher
from magic_fast.calibration.statistics.grams import Grams, MatrixKey, Regression
from magic_fast.errors import InputError
from magic_fast.reference.statistics import weighted_mean

State = Mapping[str, Tensor]
log = logging.getLogger("magic_fast")


def merge_by_data(
    experts: Any,
    data: Mapping[str, Any],
    method: str = "regmean",
    *,
    weights: Sequence[float] | None = None,
    model: nn.Module | None = None,
    off_diagonal: float | None = None,
    gradients: bool | None = None,
    draws: int | None = None,
    seed: int | None = None,
    normalize: bool | None = None,
    floor: float | None = None,
    output: Callable[[Any], Tensor] | None = None,
    preset: str | None = None,
) -> tuple[Any, DataMergeReport]:
    """Experts merged by what their own samples tell of each weight (docs/methods_data.md).

    Args:
        experts: K modules, or state dicts with ``model``; a list, or a mapping task → expert.
        data: task → batches, as :func:`calibrate_features` takes them, one task for each expert.
            Labels are not needed.
        method: ``regmean``: of every matrix the one whose outputs are nearest to the experts' on
            their own inputs. ``fisher``: the mean weighted by the Fisher information's diagonal.
        weights: of the experts; None: equal.
        model: a module of the architecture, where the experts are state dicts.
        off_diagonal: of ``regmean``: what inner products of different inputs are multiplied by,
            0.9 (0.1 under preset ``fusion_bench``).
        gradients: of ``fisher``: take ∂ log p(y|x)/∂θ, y drawn from the model's own outputs, for
            every parameter; else the mean squares of a matrix's inputs stand for it.
        draws, seed: with gradients: how many y a sample, drawn from which seed.
        normalize, floor: with gradients: each expert's information is divided by its norm over the
            model (True), and this is added to it (1e-6).
        output: with gradients: the model's output → logits [samples, …, classes].
        preset: ``fusion_bench``: that library's defaults, and its formula for gradients.

    Returns:
        (merged, report): the same kind as the experts; what no sample tells of (norms, biases,
        embeddings) is their mean, as the report says.

    Raises:
        InputError: names or shapes differ, a task has no data or no expert, a setting of another
            method.

    >>> import torch
    >>> experts = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    >>> for expert, weight in zip(experts, (1.0, 4.0)):
    ...     _ = nn.init.constant_(expert.weight, weight)
    >>> data = {"a": [torch.ones(4, 1)], "b": [torch.full((4, 1), 2.0)]}
    >>> round(merge_by_data(experts, data)[0].weight.item(), 4)  # (1·1 + 4·4) ÷ (1 + 4)
    3.4
    """
    settings = DataMethod.of(
        method, preset, off_diagonal=off_diagonal, gradients=gradients, draws=draws, seed=seed,
        normalize=normalize, floor=floor,
    )  # fmt: skip
    names, models = _experts(experts)
    structure = models[0] if isinstance(models[0], nn.Module) else model
    if not isinstance(structure, nn.Module):
        raise InputError(
            "model: expected a module of the architecture, whose layers can be run, got "
            f"{type(model).__name__}. The experts are state dicts."
        )
    states = [_state(m, f"experts[{k}]") for k, m in enumerate(models)]
    tasks = experts_by_task(len(states), names, list(data))
    factors = shares_of(weights, len(states))
    mean: dict[str, Tensor] = merge(
        None, states, "linear", weights=factors, normalize=False, out=wide_like(states[0])
    )
    for group in tied_groups(states[0]):
        mean |= dict.fromkeys(group, mean[group[0]])
    report = DataMergeReport(method)
    runs = dict(zip(data, tasks, strict=True))
    if settings.by_inputs:
        told = _by_inputs(structure, states, mean, factors, runs, data, settings, report)
    else:
        told = _by_gradients(structure, states, mean, factors, runs, data, settings, output)
    _say_what_is_left(structure, told, report)
    return _result(models[0], mean), report


def _experts(experts: Any) -> tuple[list[str] | None, list[Any]]:
    names = list(experts) if isinstance(experts, Mapping) else None
    models = list(experts.values()) if isinstance(experts, Mapping) else experts
    if not isinstance(models, Sequence) or not models or isinstance(models[0], Tensor):
        raise InputError(
            "experts: expected a list or a mapping of modules or state dicts, got "
            f"{type(experts).__name__}."
        )
    return names, list(models)


def _state(model: Any, what: str) -> State:
    found = state_dict_of(model, what)
    if isinstance(found, Tensor):
        raise InputError(f"{what}: expected a module or a state dict, got a tensor.")
    return found


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """The experts' weights, of sum 1."""
    own = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(own) != count or min(own) < 0 or not sum(own) > 0:
        raise InputError(
            f"weights: expected {count} numbers >= 0, not all 0, got {list(weights or ())}."
        )
    return [w / sum(own) for w in own]


def _by_inputs(
    structure: nn.Module,
    states: Sequence[State],
    mean: dict[str, Tensor],
    factors: Sequence[float],
    runs: Mapping[str, int],
    data: Mapping[str, Any],
    settings: DataMethod,
    report: DataMergeReport,
) -> set[str]:
    """Puts the nearest matrices into the mean; returns the parameters they are of."""
    regression = Regression(settings.scale_off_diagonal)
    for task, k in runs.items():
        weights, grams = InMemory(states[0], [], states[k], structure), Grams()
        with weights.working() as work:
            run = FeatureRun(work, weights, {task: 0}, FeatureCalibration(), gatherer=grams)
            run.run({task: data[task]})

        def change(name: str, own: State = states[k]) -> Tensor:
            return own[name].detach().to(mean[name]) - mean[name]

        regression.add(grams.found, factors[k], change)
    for key in regression.matrices():
        regression.solve(key, mean[key[0]])
        report.positions[label_of(key)] = regression.positions[key]
    return {key[0] for key in regression.matrices()}


def label_of(key: MatrixKey) -> str:
    """A matrix for reports."""
    name, start, stop = key
    return name if start is None else f"{name}[{start}:{stop}]"


def _by_gradients(
    structure: nn.Module,
    states: Sequence[State],
    mean: dict[str, Tensor],
    factors: Sequence[float],
    runs: Mapping[str, int],
    data: Mapping[str, Any],
    settings: DataMethod,
    output: Callable[[Any], Tensor] | None,
) -> set[str]:
    """Puts the means weighted by Fisher information into the mean; returns their names."""
    found: list[dict[str, Tensor]] = [{} for _ in states]
    for task, k in runs.items():
        weights = InMemory(states[0], [], states[k], structure)
        with weights.working(wide=True) as work:
            work.requires_grad_(True)
            found[k] = diagonal_fisher(
                work, data, task, output=output, draws=settings.draws, seed=settings.seed,
                like_fusion_bench=settings.like_fusion_bench,
            )  # fmt: skip
    scales = list(factors)
    if settings.normalize:
        squares = [sum(float(f.double().square().sum()) for f in own.values()) for own in found]
        inverse = [1 / (s**0.5 + settings.floor) for s in squares]
        scales = [f * i / sum(inverse) for f, i in zip(factors, inverse, strict=True)]
    for name in found[0]:
        information = [
            (own[name] + settings.floor) * scale for own, scale in zip(found, scales, strict=True)
        ]
        values = [state[name].detach().to(mean[name]) for state in states]
        mean[name].copy_(weighted_mean(values, [x.to(mean[name]) for x in information]))
    return set(found[0])


def _say_what_is_left(structure: nn.Module, told: set[str], report: DataMergeReport) -> None:
    named = dict(structure.named_parameters(remove_duplicate=False))
    reached = {id(named[name]) for name in told if name in named}
    total = left = 0
    for name, parameter in structure.named_parameters():
        if parameter.is_floating_point():
            total += parameter.numel()
            if id(parameter) not in reached:
                left += parameter.numel()
                report.averaged.append(name)
    report.left = left / total if total else 0.0
    if report.left > 0.1:
        report.warnings.append(left_text(report.left))
        log.warning("%s (%s, …)", report.warnings[-1], report.averaged[0])


def _result(like: Any, mean: Mapping[str, Tensor]) -> Any:
    state = {
        n: t.to(x.dtype)
        for (n, t), x in zip(mean.items(), _state(like, "experts[0]").values(), strict=True)
    }
    if not isinstance(like, nn.Module):
        return as_state_dict(state, like)
    return with_values(like, state)

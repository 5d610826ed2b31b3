"""A base, its experts, and their tasks; how a model is scored on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]
#: Uses of the data. No sample belongs to two.
PARTS = ("train", "calibration", "validation", "sensitivity", "test")


class Score(NamedTuple):
    """Of one task: accuracy or exact match, mean NLL, expected calibration error."""

    metric: float
    nll: float
    ece: float


@dataclass
class Problem:
    """What a merge is tried on.

    Attributes:
        base: the module; it gives the architecture too.
        experts: one state dict for each task.
        names: of the tasks.
        inputs: (part, number of task) → all inputs of the task in that part, without labels.
        score: (model, part) → a score for each task.
        trained: what pre-training gave; with it ``build`` need not pre-train again.
    """

    base: nn.Module
    experts: list[State]
    names: list[str]
    inputs: Callable[[str, int], dict[str, Tensor]]
    score: Callable[[nn.Module, str], list[Score]]
    trained: State

    @property
    def start(self) -> State:
        return state_of(self.base)

    def samples(self, part: str, size: int, seed: int) -> dict[str, list[dict[str, Tensor]]]:
        """``size`` inputs of every task: what ``mf.calibrate_features`` takes."""
        found = {}
        for k, name in enumerate(self.names):
            batch = self.inputs(part, k)
            total = len(next(iter(batch.values())))
            generator = torch.Generator().manual_seed(1000 * seed + k)
            rows = torch.randperm(total, generator=generator)[:size]
            found[name] = [{key: value[rows] for key, value in batch.items()}]
        return found


def state_of(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def norm(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
    """‖θ − θ₀‖ over all tensors."""
    return (
        sum(float((end[n].double() - t.double()).square().sum()) for n, t in start.items()) ** 0.5
    )


def own_scale(start: State, experts: Sequence[State], end: State) -> float:
    """mean‖τ_k‖ ÷ ‖θ − θ₀‖ over the whole model: the λ at which a change has an expert's size."""
    mean = sum(norm(start, e) for e in experts) / len(experts)
    return mean / norm(start, end)


def moved(start: State, end: State, scale: float) -> State:
    """θ₀ + λ·(θ − θ₀)."""
    return {n: t + scale * (end[n] - t) for n, t in start.items()}


def score_logits(logits: Tensor, labels: Tensor, bins: int = 15) -> Score:
    """Accuracy, NLL and ECE (equal bins of the top class's confidence) of [n, classes] logits."""
    losses = F.cross_entropy(logits.double(), labels)
    confidence, guess = logits.double().softmax(-1).max(-1)
    right = guess.eq(labels).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right - confidence)
    return Score(float(right.mean()), float(losses), float(gaps.abs().sum() / len(labels)))


def cosine(start: State, experts: Sequence[State]) -> float:
    """Mean cosine of the pairs of task vectors."""
    flat = [torch.cat([(e[n] - t).flatten() for n, t in start.items()]) for e in experts]
    rows = F.normalize(torch.stack(flat).double(), dim=1)
    gram, k = rows @ rows.T, len(flat)
    return float((gram.sum() - gram.trace()) / (k * (k - 1)))


def element_std(start: State, experts: Sequence[State]) -> float:
    """Standard deviation of the elements of all task vectors that are not frozen."""
    moved_parts = [
        (e[n] - t).flatten() for e in experts for n, t in start.items() if not torch.equal(e[n], t)
    ]
    return float(torch.cat(moved_parts).std())


def fit(
    parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], steps: int, rate: float
) -> None:
    """AdamW with one cycle of the learning rate."""
    optimiser = torch.optim.AdamW(parameters, rate, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    for _ in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        cycle.step()


def trainable(model: nn.Module, frozen: Sequence[str]) -> list[nn.Parameter]:
    """Parameters whose name contains none of ``frozen``; the others are switched off."""
    chosen: list[Any] = []
    for name, parameter in model.named_parameters():
        free = not any(word in name for word in frozen)
        parameter.requires_grad_(free)
        if free:
            chosen.append(parameter)
    return chosen

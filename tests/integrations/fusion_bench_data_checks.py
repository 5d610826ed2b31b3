"""RegMean and Fisher merging against FusionBench's own functions. Run by test_environments.py in an
environment that has it (`make peers-fusion-bench`)."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusion_bench.method.fisher_merging.fisher_merging import fisher_merging
from fusion_bench.method.regmean.regmean import regmean_merging
from torch import Tensor, nn

import magic_fast as mf


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.two(self.norm(torch.tanh(self.one(x)))))


class Trainer:
    """What their functions ask of transformers' one."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self._batches, self._train_batch_size = batches, len(batches[0]["x"])

    def get_train_dataloader(self) -> list[dict[str, Tensor]]:
        return self._batches

    def _prepare_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


def setting() -> tuple[list[nn.Module], dict[str, list[dict[str, Tensor]]]]:
    torch.manual_seed(0)
    base = Net()
    models = []
    for _ in range(3):
        model = copy.deepcopy(base)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        models.append(model.eval())
    data = {
        t: [{"x": (n + 1) * torch.randn(16, 12)} for _ in range(4)] for n, t in enumerate("abc")
    }
    return models, data


def same(ours: nn.Module, theirs: dict[str, Tensor], tolerance: float) -> None:
    assert dict(ours.named_parameters()).keys() == theirs.keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(
            p.detach(), theirs[name].detach(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.0])
def test_regmean(ratio: float) -> None:
    models, data = setting()
    trainers = [Trainer(b) for b in data.values()]
    theirs = regmean_merging(models, trainers, [], [64] * 3, ratio)
    ours, _ = mf.merge_by_data(models, data, off_diagonal=ratio)
    same(ours, theirs, 2e-4)  # they invert in float32
    if ratio == 0.1:
        same(mf.merge_by_data(models, data, preset="fusion_bench")[0], theirs, 2e-4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coefficients", [None, [0.5, 0.2, 0.3]])
def test_fisher(normalize: bool, coefficients: list[float] | None) -> None:
    models, data = setting()
    trainers = [Trainer(b) for b in data.values()]
    theirs = fisher_merging(models, trainers, [], [64] * 3, coefficients, normalize, 1e-6)
    ours, _ = mf.merge_by_data(
        models, data, "fisher", gradients=True, weights=coefficients, normalize=normalize,
        preset="fusion_bench",
    )  # fmt: skip
    same(ours, theirs, 2e-5)

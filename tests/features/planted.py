"""A small model whose experts moved one layer far more than the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from features.families import moved


class Chain(nn.Module):
    """Five square layers, one after another, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        return self.head(x)


def planted(size: float = 40.0) -> tuple[nn.Module, list[nn.Module]]:
    """Experts that moved ``layers.3`` far more than the rest."""
    torch.manual_seed(0)
    base = Chain().eval()
    experts = [moved(base, seed, 0.01) for seed in (1, 2)]
    with torch.no_grad():
        for expert in experts:
            for name, p in expert.layers[3].named_parameters():
                start = base.layers[3].get_parameter(name)
                p.copy_(start + size * (p - start))
    return base, experts


def samples(count: int = 24, seed: int = 5) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))

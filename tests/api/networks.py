"""A small module with everything that a merge of modules meets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Tied embedding and head, a convolution, a norm with float and integer buffers, a buffer that
    is not saved."""

    rotary: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(20, 8)
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm1d(8)
            self.norm.running_mean = torch.randn(8)
            self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("rotary", torch.full((3,), float(seed)), persistent=False)


def networks(count: int, first: int = 1) -> list[Network]:
    return [Network(first + k) for k in range(count)]


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}

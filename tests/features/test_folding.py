"""Folded weights give what hooks give, on every supported structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from features.families import FAMILIES, Case, case, case_of, run


def assert_folded_as_hooked(own: Case, **settings: Any) -> None:
    arguments = own.base, own.experts, own.merged, own.data
    folded, report = mf.calibrate_features(*arguments, clamp=None, **settings)
    hooked, other = mf.calibrate_features(*arguments, clamp=None, deploy="hooks", **settings)
    assert [x.name for x in report.layers] == [x.name for x in other.layers]
    found = [x for x in report.layers if x.coefficient is not None]
    assert found and any(abs(float(x.coefficient.mean()) - 1) > 0.1 for x in found)
    batch = next(iter(own.data.values()))[0]
    for got, want, plain in zip(
        run(folded, batch), run(hooked, batch), run(own.merged, batch), strict=True
    ):
        # float32 rounds each of a few hundred operations at 6e-8 of the largest term
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))
        if plain.dim():  # calibration changed something
            assert float((plain - got).abs().max()) > 1e-3 * float(plain.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"granularity": "channel", "p": 2},
        pytest.param({"sequential": True, "reduction": "median"}, marks=pytest.mark.slow),
    ],
    ids=["layer", "channel", "sequential"],
)
def test_transformers(family: str, settings: dict[str, Any]) -> None:
    assert_folded_as_hooked(case(family), **settings)


class Attention(nn.Module):
    """The fused attention of torch, called with keywords, a mask and a tuple output."""

    def __init__(self, kdim: int | None = None, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attn = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=batch_first)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        other = h if memory is None else memory
        padding = torch.zeros(other.shape[:2], dtype=torch.bool)
        padding[0, -1] = True
        mask = padding if self.attn.batch_first else None
        out, _ = self.attn(h, key=other, value=other, key_padding_mask=mask, need_weights=False)
        return self.head(self.norm(h + out))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3), nn.GroupNorm(2, 6), nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), nn.PReLU(4),
            nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.1)
    return nn.TransformerEncoder(layer, 2)


TORCH = {
    "attention": (Attention, lambda g: torch.randn(4, 5, 6, generator=g)),
    "attention_length_first": (
        lambda: Attention(batch_first=False), lambda g: torch.randn(4, 5, 6, generator=g),
    ),
    "cross_attention": (
        lambda: Attention(kdim=7),
        lambda g: {
            "x": torch.randn(4, 5, 6, generator=g), "memory": torch.randn(4, 6, 7, generator=g),
        },
    ),
    "convolutions": (Convolutions, lambda g: torch.randn(4, 3, 8, 8, generator=g)),
    "encoder": (_encoder, lambda g: torch.randn(4, 5, 8, generator=g)),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("sequential", [False, True], ids=["", "sequential"])
def test_torch(name: str, granularity: str, sequential: bool) -> None:
    make, samples = TORCH[name]
    own = case_of(make, samples)
    assert_folded_as_hooked(own, granularity=granularity, sequential=sequential)

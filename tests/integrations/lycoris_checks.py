"""Adapters of LyCORIS' forms against LyCORIS itself. Run by test_environments.py in an environment
that has it (`make peers-diffusers`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file
from torch import nn

import magic_fast as mf


class Net(nn.Module):
    """A matrix, a square one, a convolution, a pointwise one, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 24)
        self.sq = nn.Linear(24, 24)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 10, 1)
        self.norm = nn.LayerNorm(24)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norm(self.sq(self.fc(x))), self.point(self.conv(image))


FORMS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "lora"},
    "locon, tucker": {"algo": "lora", "use_tucker": True},
    "locon, dora": {"algo": "lora", "dora_wd": True, "wd_on_out": True},
    "locon, dora of inputs": {"algo": "lora", "dora_wd": True, "wd_on_out": False},
    "locon, rank-stabilised": {"algo": "lora", "rs_lora": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "loha, dora": {"algo": "loha", "dora_wd": True, "wd_on_out": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, both": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1},
    "lokr, full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, tucker": {"algo": "lokr", "factor": 2, "use_tucker": True, "linear_dim": 1},
    "lokr, dora": {"algo": "lokr", "factor": 4, "dora_wd": True, "wd_on_out": True},
    "full": {"algo": "full"},
}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_model_with_an_adapter_is_what_lycoris_computes(
    name: str, norms: bool, tmp_path: Path
) -> None:
    """The outputs of its forward pass."""
    torch.manual_seed(0)
    net = Net()
    (tmp_path / "base").mkdir()
    base = {n: t.clone() for n, t in net.state_dict().items()}
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    LycorisNetwork.apply_preset({
        "target_module": [], "target_name": ["fc", "sq", "conv", "point", *["norm"] * norms],
        "unet_target_module": [],
    })  # fmt: skip
    sizes = {"linear_dim": 2, "linear_alpha": 3.0, "conv_dim": 2, "conv_alpha": 3.0}
    form = sizes | FORMS[name]
    form["conv_dim"] = form["linear_dim"]
    own = create_lycoris(net, 1.0, train_norm=norms, **form)
    own.apply_to()
    with torch.no_grad():
        for p in own.parameters():
            p.add_(torch.randn_like(p) / 4)
    x, image = torch.randn(5, 12), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        want = net(x, image)
    save_file({k: v.contiguous() for k, v in own.state_dict().items()}, tmp_path / "a.safetensors")
    model = f"{tmp_path / 'base'}+{tmp_path / 'a.safetensors'}"
    mf.merge_checkpoints(
        {"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "o"
    )
    merged = Net()
    merged.load_state_dict(load_file(tmp_path / "o" / "model.safetensors"))
    changed = [n for n, t in merged.state_dict().items() if not torch.equal(t, base[n])]
    assert {"fc.weight", "sq.weight", "conv.weight", "point.weight"} <= set(changed)
    assert ("norm.weight" in changed) == norms
    with torch.no_grad():
        for got, expected in zip(merged(x, image), want, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)

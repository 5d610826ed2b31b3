"""PEFT loads what ``merge_adapters`` writes, and computes with it what the dense merge gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft", reason="peft is not installed: pip install 'magic_fast[peft]'")

import peft

import magic_fast as mf


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 20)
        self.out = nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.out(torch.tanh(self.fc(x)))
        return y


class Network(nn.Module):
    """``fc`` and ``block.fc``: a name that ends with another."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(15, 12)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.block = Block()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.fc = nn.Linear(36, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.block(self.emb(tokens))  # [N, L, 12]
        for layer in self.layers:
            x = layer(x)
        y = self.conv(x[:, None]).movedim(1, -1).flatten(2)  # [N, L, 36]
        z: Tensor = self.fc(y)
        return z


TOKENS = torch.arange(10).reshape(2, 5)


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def trained(config: Any, folder: Path, seed: int) -> Path:
    """An adapter of random numbers, saved by PEFT."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(network(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "ia3_" in name:
            nn.init.normal_(parameter, mean=1, std=0.3)
    model.save_pretrained(str(folder))
    return folder


def loaded(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(network(), str(folder)).eval()


def dense(folder: Path) -> dict[str, Tensor]:
    """The state of the network with one adapter folded in, by PEFT, in float64."""
    state: dict[str, Tensor] = loaded(folder).double().merge_and_unload().state_dict()
    return state


def output_of(state: dict[str, Tensor]) -> Tensor:
    model = network().double()
    model.load_state_dict(state)
    found: Tensor = model(TOKENS)
    return found


CONFIGS: dict[str, list[dict[str, Any]]] = {
    "alike": [{"r": 4, "target_modules": ["fc", "out"]}, {"r": 4, "target_modules": ["out", "fc"]}],
    "other modules": [
        {"r": 2, "target_modules": ["emb", "fc"]},
        {"r": 3, "target_modules": ["conv", "out"]},
    ],
    "some layers": [
        {"r": 2, "target_modules": ["fc"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"r": 3, "target_modules": ["out"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    "rsLoRA": [
        {"r": 2, "target_modules": ["fc"], "use_rslora": True},
        {"r": 3, "target_modules": ["fc"], "use_rslora": True},
    ],
    "by an expression": [
        {"r": 2, "target_modules": r"block\.fc"},
        {"r": 3, "target_modules": ["conv", "emb"]},
    ],
    "ranks by name": [
        {"r": 2, "target_modules": ["fc", "out"], "rank_pattern": {"block.fc": 5}},
        {"r": 3, "target_modules": ["fc"], "use_rslora": True},
        {"r": 1, "target_modules": ["emb"], "alpha_pattern": {"emb": 3}},
    ],
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("calibrate", [None, "sphere"])
def test_lora(tmp_path: Path, name: str, rank: int | None, calibrate: str | None) -> None:
    paths = [
        trained(peft.LoraConfig(**config), tmp_path / str(k), k)
        for k, config in enumerate(CONFIGS[name])
    ]
    report = mf.merge_adapters(
        paths, tmp_path / "out", "task_arithmetic", weights=0.6, rank=rank, calibrate=calibrate
    )
    merged = loaded(tmp_path / "out")
    found = {
        module.removeprefix("base_model.model.")
        for module, layer in merged.named_modules()
        if hasattr(layer, "base_layer")
    }
    assert found == {m.name for m in report.modules}
    got = merged.double()(TOKENS)
    if rank is None:
        base = {n: x.double() for n, x in network().state_dict().items()}
        wanted = mf.merge(
            base, [dense(path) for path in paths], "task_arithmetic", weights=0.6,
            calibrate=calibrate,
        )  # fmt: skip
        torch.testing.assert_close(got, output_of(wanted), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got, output_of(dense(tmp_path / "out")), rtol=1e-9, atol=1e-9)


IA3: list[dict[str, Any]] = [
    {"target_modules": ["block.fc", "out", "conv"], "feedforward_modules": ["out"]},
    {"target_modules": ["block.fc", "layers.0.fc"], "feedforward_modules": []},
]


@pytest.mark.parametrize("preset", [None, "peft"])
def test_ia3(tmp_path: Path, preset: str | None) -> None:
    """PEFT's own sum of vectors under its preset; else what the vectors change, added up."""
    paths = [trained(peft.IA3Config(**c), tmp_path / str(k), k) for k, c in enumerate(IA3)]
    weights = [0.7, 0.4]
    mf.merge_adapters(paths, tmp_path / "out", "task_arithmetic", weights=weights, preset=preset)
    merged = loaded(tmp_path / "out")
    own = peft.PeftModel.from_pretrained(network(), str(paths[0]), adapter_name="0")
    own.load_adapter(str(paths[1]), adapter_name="1")
    if preset == "peft":
        own.base_model.add_weighted_adapter(["0", "1"], weights, "both")
        own.set_adapter("both")
        wanted = copy.deepcopy(own).eval()(TOKENS)
        torch.testing.assert_close(merged(TOKENS), wanted)
        return
    for name, layer in merged.named_modules():
        if not hasattr(layer, "ia3_l"):
            continue
        theirs = dict(own.named_modules())[name].ia3_l
        wanted = 1 + sum(
            w * (theirs[str(k)] - 1) for k, w in enumerate(weights) if str(k) in theirs
        )
        torch.testing.assert_close(layer.ia3_l["default"], wanted)


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_by_factors_as_peft(tmp_path: Path, kind: str) -> None:
    """On factors, under its preset, the merge is PEFT's own."""
    config = {"r": 4, "target_modules": ["fc", "out", "emb"]}
    paths = [trained(peft.LoraConfig(**config), tmp_path / str(k), k) for k in range(3)]
    weights, density = [0.7, -0.4, 0.9], None if kind == "linear" else 0.5
    mf.merge_adapters(
        paths, tmp_path / "out", "task_arithmetic" if kind == "linear" else kind, weights=weights,
        density=density, preset="peft", on="factors",
    )  # fmt: skip
    own = peft.PeftModel.from_pretrained(network(), str(paths[0]), adapter_name="0")
    for k in (1, 2):
        own.load_adapter(str(paths[k]), adapter_name=str(k))
    own.add_weighted_adapter(["0", "1", "2"], weights, "all", kind, density=density)
    own.set_adapter("all")
    torch.testing.assert_close(loaded(tmp_path / "out")(TOKENS), own.eval()(TOKENS))

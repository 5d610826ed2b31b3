"""Calibration of timm's and torchvision's models. Run by ``test_environments.py`` in an environment
that has them (`make peers-vision`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models import ResNet, VisionTransformer, vgg11
from torchvision.models.resnet import BasicBlock

import magic_fast as mf


def made(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vit": (
        made("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=3, reg_tokens=2),
        "head.weight",
    ),
    "swin_v2": (
        made(
            "swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=12, depths=(1, 1),
            num_heads=(3, 3),
        ),
        "head.fc.weight",
    ),
    "beit": (
        made("beit_base_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=3),
        "head.weight",
    ),
    "convnext": (made("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 12, 16)), "head.fc.weight"),
    "efficientnet": (made("efficientnet_b0"), "classifier.weight"),
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), "fc.weight"),
    "torchvision_vit": (
        lambda: VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=5), "heads.head.weight",
    ),
}  # fmt: skip
#: What holds the weights of the maps in these models, and nothing else that does.
MAPS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)


def moved(base: nn.Module, seed: int) -> nn.Module:
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("as_state", [False, True], ids=["module", "state_dict"])
def test_rows_are_those_of_maps_but_the_head(name: str, as_state: bool) -> None:
    torch.manual_seed(0)
    make, head = MODELS[name]
    base = make().eval()
    models: list[Any] = [base, moved(base, 1), moved(base, 2)]
    if as_state:
        models = [m.state_dict() for m in models]
    merged = mf.merge(models[0], models[1:], "average")
    report = mf.calibrate_weights(models[0], models[1:], merged, calibration="sphere")[1]
    expected = {
        f"{path}.{local}"
        for path, module in base.named_modules()
        if isinstance(module, MAPS)
        for local, own in module.named_parameters(recurse=False)
        if own.dim() > 1
    } - {head}
    assert head in dict(base.named_parameters())
    assert {t.name for t in report.tensors if t.calibrated} == expected


def test_a_head_of_several_layers_stays_by_name() -> None:
    model = vgg11(num_classes=5)
    names = [n for n, _ in model.named_parameters() if n.startswith("classifier.")]
    base, expert = ({n: torch.randn(4, 4) for n in names if "weight" in n} for _ in range(2))
    report = mf.calibrate_weights(base, [expert], expert, calibration="sphere")[1]
    assert len(report.tensors) == 3 and not any(t.calibrated for t in report.tensors)

"""FSC of small modules that behave as the blocks of timm, torchvision, open_clip and diffusers do,
against plain evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magic_fast as mf
from features import walking
from features.families import TASKS, average, moved


class LayerNorm2d(nn.LayerNorm):
    """timm's: over the channels of [N, C, H, W]."""

    data_format = "channels_first"

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Response(nn.Module):
    """ConvNeXt V2's global response normalisation, over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=(1, 2), keepdim=True)
        return x + self.weight * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.bias


class ConvNeXt(nn.Module):
    """Depthwise convolution, norm, two linear layers, a layer scale that is its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 2, 2), LayerNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.grn, self.down = nn.Linear(8, 16), Response(16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        h = self.depthwise(x).permute(0, 2, 3, 1)
        h = self.down(self.grn(F.gelu(self.up(h)))) * self.gamma
        return x + h.permute(0, 3, 1, 2)


class FrozenBatchNorm2d(nn.Module):
    """torchvision's: buffers alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Bottleneck(nn.Module):
    """torchvision's convolutions with frozen and live norms, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), FrozenBatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        h = torch.relu(self.bn2(self.conv2(h)))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        return self.head((h * gate).mean((2, 3)))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TextTower(nn.Module):
    """open_clip's: sequence first, positions added as they are, attention of torch, QuickGELU."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(31, 8)
        self.positional_embedding = nn.Parameter(torch.randn(8, 8))
        self.ln_1, self.ln_2, self.ln_final = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.ls_1 = nn.MultiheadAttention(8, 2), LayerScale(8)
        self.c_fc, self.c_proj = nn.Linear(8, 16), nn.Linear(16, 8)
        self.text_projection = nn.Parameter(torch.randn(8, 4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.token_embedding(input_ids) + self.positional_embedding[: input_ids.shape[1]]
        x = x.permute(1, 0, 2)
        hidden = None if attention_mask is None else attention_mask == 0
        y = self.ln_1(x)
        x = x + self.ls_1(self.attn(y, y, y, need_weights=False, key_padding_mask=hidden)[0])
        y = self.c_fc(self.ln_2(x))
        x = self.ln_final(x + self.c_proj(y * torch.sigmoid(1.702 * y))).permute(1, 0, 2)
        return x @ self.text_projection


class Resnet(nn.Module):
    """diffusers' block: group norms, a time embedding, a transposed convolution upwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(1, 3), nn.Conv2d(3, 8, 3, padding=1)
        self.time, self.norm2 = nn.Linear(6, 8), nn.GroupNorm(4, 8)
        self.conv2, self.shortcut = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.up = nn.ConvTranspose2d(8, 5, 2, 2)

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(sample))) + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h))) + self.shortcut(sample)
        return self.up(h)


class Compatible(nn.Linear):
    """diffusers' linear layer that takes a LoRA: a subclass with a forward of its own."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Transformer(nn.Module):
    """diffusers': to_q, to_k, to_v, to_out, cross-attention, GEGLU, shift and scale from a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8, elementwise_affine=False)
        self.modulation = nn.Linear(6, 16)
        self.to_q, self.to_k, self.to_v = (Compatible(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.1)])
        self.cross_k, self.cross_v = nn.Linear(5, 8, bias=False), nn.Linear(5, 8, bias=False)
        self.geglu, self.out = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, sample: Tensor, time: Tensor, encoder: Tensor) -> Tensor:
        x = sample.flatten(2).transpose(1, 2)
        shift, scale = self.modulation(F.silu(time))[:, None].chunk(2, -1)
        h = self.norm1(x) * (1 + scale) + shift
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        x = x + self.to_out[1](self.to_out[0](h))
        x = x + F.scaled_dot_product_attention(x, self.cross_k(encoder), self.cross_v(encoder))
        value, gate = self.geglu(x).chunk(2, -1)
        return x + self.out(value * F.gelu(gate))


def image(draw: torch.Generator) -> Any:
    return torch.randn(2, 3, 8, 8, generator=draw).double()


def timed(draw: torch.Generator) -> Any:
    return {"sample": image(draw), "time": torch.randn(2, 6, generator=draw).double()}


def crossed(draw: torch.Generator) -> Any:
    return {
        "sample": torch.randn(2, 8, 3, 3, generator=draw).double(),
        "time": torch.randn(2, 6, generator=draw).double(),
        "encoder": torch.randn(2, 4, 5, generator=draw).double(),
    }


def padded(draw: torch.Generator) -> Any:
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(3, 31, (3, 8), generator=draw), "attention_mask": mask}


def alone(batch: Any) -> list[Any]:
    """The samples of a batch; without padding the batch."""
    if not isinstance(batch, dict) or "attention_mask" not in batch:
        return [batch]
    lengths = batch["attention_mask"].sum(1)
    return [{"input_ids": batch["input_ids"][n : n + 1, :m]} for n, m in enumerate(lengths)]


#: Model, samples, what the plain evaluation does not see as layers, what is left.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], set[str], set[str]]] = {
    "convnext": (ConvNeXt, image, {"gamma", "grn"}, set()),
    "bottleneck": (Bottleneck, image, set(), set()),
    "text_tower": (
        TextTower, padded,
        {"attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v", "attn.out_proj", "text_projection"},
        {"positional_embedding"},
    ),
    "resnet": (Resnet, timed, set(), set()),
    "transformer": (Transformer, crossed, {"to_q", "to_k", "to_v"}, set()),
}  # fmt: skip


def case(block: str) -> walking.Walk:
    make, samples, _, _ = BLOCKS[block]
    torch.manual_seed(0)
    base = make().double().eval()
    experts = [moved(base, seed, 0.05) for seed in (1, 2)]
    draw = torch.Generator().manual_seed(3)
    data = {task: [samples(draw) for _ in range(2)] for task in TASKS}
    singles = {task: [one for b in own for one in alone(b)] for task, own in data.items()}
    calls = {t: [x if isinstance(x, dict) else {"x": x} for x in own] for t, own in singles.items()}
    return walking.Walk(base, experts, average(experts), data, calls)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("p", [1, 2])
def test_against_plain_evaluation(block: str, p: int) -> None:
    own, (_, _, others, left) = case(block), BLOCKS[block]
    want, positions, _ = walking.expected(own, p)
    found, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, p=p, clamp=None
    )
    layers = {x.name: x for x in report.layers}
    assert {x.name for x in report.layers if x.note} == left
    assert set(layers) == {n for n in want if n not in others} | others | left
    for name in set(want) - others:
        assert float(layers[name].coefficient) == pytest.approx(want[name], rel=1e-9), name
        assert layers[name].positions == positions[name]
    hooked, _ = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, p=p, clamp=None, deploy="hooks"
    )
    with torch.no_grad():
        for sample in own.alone["first"]:
            torch.testing.assert_close(found(**sample), hooked(**sample), rtol=1e-5, atol=1e-6)


def rows(own: walking.Walk, task: str, name: str, apply: Callable[[nn.Module, Tensor], Tensor],
         p: float) -> float:  # fmt: skip
    """ξ of one task of a layer that no module stands for, from the inputs of module ``name``."""
    inputs: list[Tensor] = []
    hook = own.merged.get_submodule(name).register_forward_hook(lambda m, a, o: inputs.append(o))
    upper = lower = 0.0
    k = list(own.data).index(task)
    with torch.no_grad():
        for sample in own.alone[task]:
            inputs.clear()
            own.merged(**sample)
            start, one, end = (apply(m, inputs[0]) for m in (own.base, own.experts[k], own.merged))
            upper += float((one - start).norm(p=p, dim=-1).sum())
            lower += float((end - start).norm(p=p, dim=-1).sum())
    hook.remove()
    return upper / lower


OTHERS: dict[str, tuple[str, str, Callable[[Any, Tensor], Tensor]]] = {
    "text_projection": ("text_tower", "ln_final", lambda m, z: z @ m.text_projection),
    "attn.in_proj.q": (
        "text_tower", "ln_1",
        lambda m, z: F.linear(z, m.attn.in_proj_weight[:8], m.attn.in_proj_bias[:8]),
    ),
    "gamma": ("convnext", "down", lambda m, z: z * m.gamma),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("p", [1, 2])
def test_layers_that_no_module_stands_for(name: str, p: int) -> None:
    block, source, apply = OTHERS[name]
    own = case(block)
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data, p=p, clamp=None)
    layer = next(x for x in report.layers if x.name == name)
    want = sum(rows(own, task, source, apply, p) for task in TASKS) / 2
    assert float(layer.coefficient) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("block", BLOCKS)
def test_channels(block: str) -> None:
    """Each channel by itself: |·| summed over positions."""
    own = case(block)
    _, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, granularity="channel", clamp=None
    )
    checked = 0
    for layer in report.layers:
        if layer.note or not layer.applied.dim():
            continue
        checked += 1
        weight = own.merged.get_parameter(layer.tensors[0])
        assert len(layer.applied) in weight.shape or ".in_proj." in layer.name
        assert all(math.isfinite(x) for x in layer.applied.tolist())
    assert checked >= len(report.layers) - 2

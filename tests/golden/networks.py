"""The small networks whose weights and activations are recorded in the feature space cases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from golden.golden_case import GoldenCase


class Mlp(nn.Module):
    def __init__(self, din: int, h: int, dout: int) -> None:
        super().__init__()
        self.fc1, self.act, self.ln_1 = nn.Linear(din, h), nn.GELU(), nn.LayerNorm(h)
        self.fc2 = nn.Linear(h, dout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ln_1(self.act(self.fc1(x))))


class SeparateAttention(nn.Module):
    """[L, N, D], four linear layers."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d) for _ in range(3))
        self.out_proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        length, samples, d = x.shape
        q, k, v = (
            f(x).reshape(length, samples, self.heads, -1).permute(1, 2, 0, 3)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).softmax(-1)
        return self.out_proj((weights @ v).permute(2, 0, 1, 3).reshape(length, samples, d))


class Feedforward(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, hidden: int, mha: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, heads) if mha else SeparateAttention(d, heads)
        self.ln_2, self.mlp = nn.LayerNorm(d), Feedforward(d, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        fused = isinstance(self.attn, nn.MultiheadAttention)
        x = x + (self.attn(h, h, h)[0] if fused else self.attn(h))
        return x + self.mlp(self.ln_2(x))


class Lnd(nn.Module):
    """Samples in [N, L, D]; the blocks work in [L, N, D]."""

    def __init__(self, d: int, heads: int, hidden: int, layers: int, dout: int, mha: bool) -> None:
        super().__init__()
        blocks = [Block(d, heads, hidden, mha) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_post, self.head = nn.LayerNorm(d), nn.Linear(d, dout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transformer["resblocks"](x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.head(self.ln_post(x[:, 0]))


class Named(nn.Module):
    """Children by name."""

    def __init__(self, /, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class BertLayer(nn.Module):
    def __init__(self, d: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        own = Named(**{n: nn.Linear(d, d) for n in ("query", "key", "value")})
        out = Named(dense=nn.Linear(d, d), LayerNorm=nn.LayerNorm(d))
        self.attention = Named(**{"self": own, "output": out})
        self.intermediate = Named(dense=nn.Linear(d, hidden))
        self.output = Named(dense=nn.Linear(hidden, d), LayerNorm=nn.LayerNorm(d))

    def forward(self, x: Tensor) -> Tensor:
        samples, length, d = x.shape
        own: Any = self.attention.get_submodule("self")
        q, k, v = (
            f(x).reshape(samples, length, self.heads, -1).transpose(1, 2)
            for f in (own.query, own.key, own.value)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).softmax(-1)
        heads = (weights @ v).transpose(1, 2).reshape(samples, length, d)
        after: Any = self.attention.output
        x = after.LayerNorm(x + after.dense(heads))
        middle = nn.functional.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(x + self.output.dense(middle))


class Bert(nn.Module):
    def __init__(self, vocab: int, d: int, heads: int, hidden: int, layers: int, dout: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, d)
        self.layer = nn.Sequential(*(BertLayer(d, heads, hidden) for _ in range(layers)))
        self.classifier = nn.Linear(d, dout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.layer(self.word_embeddings(ids))[:, 0])


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, dout: int) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(3, c1, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(c1, c2, 3, stride=2), nn.ReLU()
        self.fc = nn.Linear(c2, dout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


ARCHITECTURES = {"mlp_ln": Mlp, "lnd": Lnd, "bert": Bert, "conv": Conv}


def network(case: GoldenCase, state: Mapping[str, Tensor]) -> nn.Module:
    """The case's network with the given weights."""
    made = ARCHITECTURES[case.params["arch"]](**case.params["arch_kwargs"])
    made.load_state_dict(dict(state))
    return made.eval()


def calibration_data(case: GoldenCase) -> dict[str, list[Tensor]]:
    """{T0: [the first ``req`` samples], …}"""
    tasks = [n.removeprefix("calib.") for n in case.inputs if n.startswith("calib.")]
    return {t: [case.inputs[f"calib.{t}"][: case.params["req"]]] for t in sorted(tasks)}


def outputs_of(model: nn.Module, probe: Tensor, layers: list[str]) -> dict[str, Tensor]:
    """What each named module, hooks included, and the whole model give."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in layers]
    with torch.no_grad():
        found[""] = model(probe)
    for handle in handles:
        handle.remove()
    return found

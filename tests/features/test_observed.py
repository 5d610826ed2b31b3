"""Weights that no call of a layer of their own shows: stacks of experts, projections that are read
by other modules, subclasses of known layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import magic_fast as mf
from features.families import TASKS, Case, case_of

SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip


def text(generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, 31, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    )


def gpt_oss() -> nn.Module:
    return tf.GptOssForCausalLM(
        tf.GptOssConfig(**SIZES, head_dim=4, num_local_experts=4, num_experts_per_tok=2)
    )


def llama4() -> nn.Module:
    return tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **SIZES, head_dim=4, intermediate_size_mlp=12, num_local_experts=4,
            num_experts_per_tok=1,
        )
    )  # fmt: skip


def routed(model: nn.Module, name: str, batches: list[Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, the experts they go to, their weights) at a module of a stack, without padding."""
    found: list[Any] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: found.append(a))
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].sum(1)
            for row, length in enumerate(mask):
                model(**{k: v[row : row + 1, :length] for k, v in batch.items()})
    handle.remove()
    return found


def ratio(rows: list[tuple[Tensor, Tensor]], p: float = 1) -> float:
    upper, lower = (sum(float(r[n].norm(p=p, dim=-1).sum()) for r in rows) for n in (0, 1))
    return upper / lower


@pytest.mark.parametrize("p", [1, 2])
def test_experts_out_in(p: int) -> None:
    """[E, out, in]: by the tokens routed to each, one ξ an expert and projection."""
    own = case_of(mixtral, text)
    for m in (own.base, *own.experts, own.merged):
        m.double()
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data, p=p, clamp=None)
    layers = {x.name: x for x in report.layers}
    assert not [x.name for x in report.layers if x.note]
    name = "model.layers.0.mlp.experts"
    stacks = [m.get_submodule(name) for m in (own.base, *own.experts, own.merged)]
    for expert in range(4):
        want: dict[str, list[float]] = {"gate_up_proj": [], "down_proj": []}
        counted = 0
        for k, task in enumerate(TASKS):
            ups, downs = [], []
            for hidden, to, _ in routed(own.merged, name, own.data[task]):
                z = hidden[(to == expert).any(-1)]
                counted += len(z)
                gate, up = (z @ stacks[3].gate_up_proj[expert].t()).chunk(2, -1)
                for rows, x, which in (
                    (ups, z, "gate_up_proj"), (downs, F.silu(gate) * up, "down_proj"),
                ):  # fmt: skip
                    start, one, end = (
                        x @ getattr(stacks[n], which)[expert].t() for n in (0, 1 + k, 3)
                    )
                    rows.append((one - start, end - start))
            want["gate_up_proj"].append(ratio(ups, p))
            want["down_proj"].append(ratio(downs, p))
        for which, values in want.items():
            found = layers[f"{name}.{which}.{expert}"]
            assert float(found.coefficient) == pytest.approx(sum(values) / 2, rel=1e-9)
            assert found.positions == counted


def test_experts_in_out_with_biases() -> None:
    """[E, in, out] and [E, out]: weight and bias of an expert are one map."""
    own = case_of(gpt_oss, text)
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data, clamp=None)
    layers = {x.name: x for x in report.layers}
    name = "model.layers.0.mlp.experts"
    assert layers[f"{name}.gate_up_proj.2"].tensors == [
        f"{name}.gate_up_proj", f"{name}.gate_up_proj_bias",
    ]  # fmt: skip
    stacks = [m.get_submodule(name) for m in (own.base, *own.experts, own.merged)]
    for expert in range(4):
        want = []
        for k, task in enumerate(TASKS):
            rows = []
            for hidden, to, _ in routed(own.merged, name, own.data[task]):
                z = hidden[(to == expert).any(-1)]
                start, one, end = (
                    z @ stacks[n].gate_up_proj[expert] + stacks[n].gate_up_proj_bias[expert]
                    for n in (0, 1 + k, 3)
                )
                rows.append((one - start, end - start))
            want.append(ratio(rows))
        found = layers[f"{name}.gate_up_proj.{expert}"]
        assert float(found.coefficient) == pytest.approx(sum(want) / 2, rel=1e-4)


@pytest.mark.parametrize("make", [mixtral, gpt_oss, llama4])
@pytest.mark.parametrize("sequential", [False, True])
def test_folded_experts(make: Callable[[], nn.Module], sequential: bool) -> None:
    """Each expert's slice is base + ξ·(merged − base); hooks give the same; nothing stays set."""
    own = case_of(make, text)
    arguments = (own.base, own.experts, own.merged, own.data)
    found, report = mf.calibrate_features(*arguments, sequential=sequential)
    starts, ends, values = (dict(m.named_parameters()) for m in (own.base, own.merged, found))
    seen = 0
    for layer in report.layers:
        stack, _, expert = layer.name.rpartition(".")
        if expert.isdigit() and ".experts." in stack:
            seen += 1
            for name in layer.tensors:
                start, end, got = (x[name][int(expert)] for x in (starts, ends, values))
                want = start + float(layer.applied) * (end - start)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert seen == 8
    hooked, _ = mf.calibrate_features(*arguments, sequential=sequential, deploy="hooks")
    batch = own.data["first"][0]
    with torch.no_grad():
        one, two = (m(**batch).logits for m in (found, hooked))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    for model in (own.merged, found):
        assert model.config._experts_implementation == own.base.config._experts_implementation


def test_experts_that_nothing_reaches_are_named() -> None:
    own = case_of(mixtral, lambda _: {"input_ids": torch.tensor([[5]])})  # goes to two of four
    found, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data)
    unreached = [x for x in report.layers if x.note == "no sample reaches this expert"]
    assert len(unreached) == 4 and sum(".experts." in x.name for x in report.layers) == 8
    for layer in unreached:
        expert = int(layer.name.rpartition(".")[2])
        got, want = (m.get_parameter(layer.tensors[0])[expert] for m in (found, own.merged))
        assert torch.equal(got, want)


class Projected(nn.Module):
    """An attention that reads its layer's weight: BEiT's, EVA's and Swin v2's way."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.out = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return x + self.scale * self.out(F.scaled_dot_product_attention(q, k, v))


def net(part: Callable[[], nn.Module], width: int = 6) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(5, width), nn.Tanh(), part())


def floats(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 4, 5, generator=generator)


def inputs_of(own: Case, task: str) -> list[Tensor]:
    with torch.no_grad():
        return [own.merged[1](own.merged[0](x)) for x in own.data[task]]


@pytest.mark.parametrize("sequential", [False, True])
def test_a_weight_that_is_read(sequential: bool) -> None:
    own = case_of(net(Projected), floats)
    found, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, sequential=sequential, clamp=None
    )
    layers = {x.name: x for x in report.layers}
    assert not [x.name for x in report.layers if x.note]
    assert layers["2.qkv"].tensors == ["2.qkv.weight", "2.q_bias", "2.v_bias"]
    first = layers["0"].applied
    want = []
    for k, task in enumerate(TASKS):
        rows = []
        for x in own.data[task]:
            with torch.no_grad():
                start, end = own.base[0], own.merged[0]
                factor = float(first) if sequential else 1.0
                h = start(x) + factor * (end(x) - start(x))
                z = torch.tanh(h)
                a, b, c = (
                    F.linear(
                        z, m[2].qkv.weight,
                        torch.cat((m[2].q_bias, torch.zeros(6), m[2].v_bias)),
                    )
                    for m in (own.base, own.experts[k], own.merged)
                )  # fmt: skip
            rows.append((b - a, c - a))
        want.append(ratio(rows))
    assert float(layers["2.qkv"].coefficient) == pytest.approx(sum(want) / 2, rel=1e-4)
    for name in layers["2.qkv"].tensors:
        base, merged, got = (m.get_parameter(name) for m in (own.base, own.merged, found))
        torch.testing.assert_close(
            got, base + float(layers["2.qkv"].applied) * (merged - base), rtol=1e-5, atol=1e-6
        )
    scale = layers["2.scale"]
    assert scale.tensors == ["2.scale"] and scale.positions == 2 * 2 * 12


class NormAct(nn.BatchNorm2d):
    """timm's way: the norm's forward ends with the activation."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        return torch.relu(out)


class Standardised(nn.Conv2d):
    """Weight-standardised: not linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.layer_norm(self.weight, self.weight.shape[1:])
        return F.conv2d(x, weight, self.bias)


class ChannelsFirst(nn.LayerNorm):
    """A norm over the channels of [N, C, H, W]: ConvNeXt's."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class Doubled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def images(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=generator)


def stack_of(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), kind(), nn.Conv2d(4, 2, 1))

    return make


def test_a_norm_that_ends_with_its_activation() -> None:
    """ξ is of what is linear in its parameters: the norm before the activation."""
    own = case_of(stack_of(lambda: NormAct(4)), images)
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data, clamp=None)
    layer = next(x for x in report.layers if x.name == "1")
    want = []
    for k, task in enumerate(TASKS):
        rows = []
        for x in own.data[task]:
            with torch.no_grad():
                unit = own.merged[0](x) / math.sqrt(1 + 1e-5)
                change = [
                    (unit.movedim(1, -1) * (m[1].weight - own.base[1].weight))
                    + (m[1].bias - own.base[1].bias)
                    for m in (own.experts[k], own.merged)
                ]
            rows.append((change[0], change[1]))
        want.append(ratio(rows))
    assert not layer.note
    assert float(layer.coefficient) == pytest.approx(sum(want) / 2, rel=1e-4)


@pytest.mark.parametrize("p", [2, math.inf])
def test_channels_are_found_by_trial(p: float) -> None:
    own = case_of(stack_of(lambda: ChannelsFirst(4)), images)
    _, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, p="inf" if p == math.inf else p, clamp=None
    )
    layer = next(x for x in report.layers if x.name == "1")
    want = []
    for k, task in enumerate(TASKS):
        rows = []
        for x in own.data[task]:
            with torch.no_grad():
                z = own.merged[0](x)
                a, b, c = (m[1](z).movedim(1, -1) for m in (own.base, own.experts[k], own.merged))
            rows.append((b - a, c - a))
        want.append(ratio(rows, p))
    assert layer.positions == 2 * 2 * 2 * 16 and not layer.note
    assert float(layer.coefficient) == pytest.approx(sum(want) / 2, rel=1e-4)
    _, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, granularity="channel"
    )
    assert next(x for x in report.layers if x.name == "1").applied.shape == (4,)


def test_a_computed_weight_is_left() -> None:
    own = case_of(stack_of(lambda: Standardised(4, 4, 1)), images)
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data)
    notes = {x.name: x.note for x in report.layers if x.note}
    assert set(notes) <= {"1", "1.weight", "1.bias"} and notes


def test_the_older_weight_norm_is_left_with_its_reason() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(5, 5)
            torch.nn.utils.weight_norm(self.one)
            self.two = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))  # type: ignore[no-any-return]

        def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
            other = Wrapped()
            with torch.no_grad():
                for a, b in zip(other.parameters(), self.parameters(), strict=True):
                    a.copy_(b)
            return other

    own = case_of(Wrapped, floats)
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data)
    notes = {x.name: x.note for x in report.layers if x.note}
    why = "its weight is computed from it (WeightNorm)"
    assert notes == dict.fromkeys(("one.weight_g", "one.weight_v", "one.bias"), why)


def test_a_subclass_of_an_embedding_is_tried() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = Doubled(31, 6), nn.Linear(6, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.embed(input_ids))  # type: ignore[no-any-return]

    own = case_of(Words, text)
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data, clamp=None)
    layer = next(x for x in report.layers if x.name == "embed")
    want = []
    for k, task in enumerate(TASKS):
        rows = []
        for batch in own.data[task]:
            ids = batch["input_ids"][batch["attention_mask"].bool()]
            a, b, c = (m.embed.weight[ids] for m in (own.base, own.experts[k], own.merged))
            rows.append((b - a, c - a))
        want.append(ratio(rows))
    assert float(layer.coefficient) == pytest.approx(sum(want) / 2, rel=1e-4)


class Fused(nn.Module):
    """Two chained weights and a router in one module, without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(7, 6))
        self.second = nn.Parameter(torch.randn(7, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.temperature = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.linear(x, self.first))
        return (h @ self.second + self.bias) * self.temperature.exp()


@pytest.mark.parametrize("sequential", [False, True])
def test_chained_weights(sequential: bool) -> None:
    own = case_of(net(Fused), floats)
    _, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, sequential=sequential, clamp=None
    )
    layers = {x.name: x for x in report.layers}
    assert layers["2.second"].tensors == ["2.second", "2.bias"]
    assert layers["2.temperature"].note == "its use in exp is no linear map"
    running = copy.deepcopy(own.merged)
    if sequential:
        with torch.no_grad():
            for local in ("0.weight", "0.bias", "2.first"):
                start, end = own.base.get_parameter(local), running.get_parameter(local)
                name = "0" if local[0] == "0" else local
                end.copy_(start + float(layers[name].applied) * (end - start))
    want = []
    for k, task in enumerate(TASKS):
        rows = []
        for x in own.data[task]:
            with torch.no_grad():
                z = torch.relu(F.linear(running[1](running[0](x)), running[2].first))
                a, b, c = (
                    z @ m[2].second + m[2].bias for m in (own.base, own.experts[k], own.merged)
                )
            rows.append((b - a, c - a))
        want.append(ratio(rows))
    assert float(layers["2.second"].coefficient) == pytest.approx(sum(want) / 2, rel=1e-4)


def test_a_tied_head_that_is_read() -> None:
    """Embedding and functional head are one group: both uses count."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid = nn.Embedding(31, 6), nn.Linear(6, 6)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.mid(self.embed(input_ids))), self.embed.weight)

    own = case_of(Tied, text)
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data, clamp=None)
    layer = next(x for x in report.layers if x.name == "embed")
    assert layer.positions == 2 * 2 * 2 * 19
    want = []
    for k, task in enumerate(TASKS):
        rows = []
        for batch in own.data[task]:
            keep = batch["attention_mask"].bool()
            with torch.no_grad():
                ids = batch["input_ids"][keep]
                z = torch.tanh(own.merged.mid(own.merged.embed(ids)))
                w = [m.embed.weight for m in (own.base, own.experts[k], own.merged)]
                rows.append((w[1][ids] - w[0][ids], w[2][ids] - w[0][ids]))
                rows.append((z @ (w[1] - w[0]).t(), z @ (w[2] - w[0]).t()))
        want.append(ratio(rows))
    assert float(layer.coefficient) == pytest.approx(sum(want) / 2, rel=1e-4)

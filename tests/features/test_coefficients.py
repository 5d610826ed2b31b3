"""ξ against its definition, written out with whole activations in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from features.families import TASKS, average, case, moved


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up, self.norm, self.down = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 6)
        self.unused = nn.Linear(2, 2)
        self.offset = nn.Parameter(torch.ones(6))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        return h + self.down(self.norm(torch.relu(self.up(h)))) * self.offset.tanh()


LAYERS = ("embed", "up", "norm", "down")


def models() -> tuple[nn.Module, list[nn.Module], nn.Module]:
    torch.manual_seed(0)
    base = Net().double()
    experts = [moved(base, seed, 0.1) for seed in (1, 2)]
    return base, experts, average(experts)


def samples() -> dict[str, list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(5)
    return {
        t: [{"input_ids": torch.randint(0, 11, (n, 4), generator=g)} for n in (3, 2)] for t in TASKS
    }


def inputs_of(model: nn.Module, layer: str, batch: dict[str, Tensor]) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda m, a: found.append(a[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found[0]


def features(
    parts: tuple[nn.Module, nn.Module, nn.Module],
    layer: str,
    batches: list[dict[str, Tensor]],
    running: nn.Module,
) -> tuple[Tensor, Tensor]:
    """(h_k − h_0, h_m − h_0) [positions, channels] on what ``running`` gives the layer."""
    rows: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        z = inputs_of(running, layer, batch)
        with torch.no_grad():
            start, own, merged = (m.get_submodule(layer)(z) for m in parts)
        keep = batch.get("attention_mask")
        pair = [(h - start).reshape(-1, h.shape[-1]) for h in (own, merged)]
        rows.append(tuple(x if keep is None else x[keep.bool().flatten()] for x in pair))  # type: ignore[arg-type]
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])


def definition(own: Tensor, merged: Tensor, reduction: str, p: float) -> float:
    upper, lower = (x.norm(p=p, dim=-1) for x in (own, merged))
    if reduction == "ratio_of_sums":
        return float(upper.sum() / lower.sum())
    ratio = upper / lower
    return float(ratio.mean() if reduction == "mean" else ratio.median())


@pytest.mark.parametrize("reduction", ["ratio_of_sums", "mean", "median"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_layer(reduction: str, p: float) -> None:
    base, experts, merged = models()
    data = samples()
    _, report = mf.calibrate_features(base, experts, merged, data, reduction=reduction, p=p)
    layers = {x.name: x for x in report.layers}
    for name in LAYERS:
        want = [
            definition(*features((base, e, merged), name, data[t], merged), reduction, p)
            for t, e in zip(TASKS, experts, strict=True)
        ]
        got = [float(layers[name].by_task[t]) for t in TASKS]
        assert got == pytest.approx(want, rel=1e-6)  # medians are kept in float32
        assert float(layers[name].coefficient) == pytest.approx(sum(want) / 2, rel=1e-6)


def test_channel() -> None:
    base, experts, merged = models()
    data = samples()
    found, report = mf.calibrate_features(
        base, experts, merged, data, granularity="channel", clamp=None
    )
    layers = {x.name: x for x in report.layers}
    for name in LAYERS:
        want = torch.zeros_like(layers[name].coefficient)
        for t, e in zip(TASKS, experts, strict=True):
            own, other = features((base, e, merged), name, data[t], merged)
            want += own.abs().sum(0) / other.abs().sum(0) / 2
        torch.testing.assert_close(layers[name].coefficient, want)
        start, end, got = (m.get_parameter(f"{name}.weight") for m in (base, merged, found))
        by_row = want[:, None] if name in ("up", "down") else want
        # ξ is applied in float32
        torch.testing.assert_close(got, start + by_row * (end - start), rtol=1e-6, atol=1e-7)


def test_padding_has_no_part() -> None:
    base, experts, merged = models()
    data = samples()
    for batches in data.values():
        for batch in batches:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, 2:] = 0
    _, report = mf.calibrate_features(base, experts, merged, data)
    layers = {x.name: x for x in report.layers}
    for name in LAYERS:
        pairs = zip(TASKS, experts, strict=True)
        want = [
            definition(*features((base, e, merged), name, data[t], merged), "ratio_of_sums", 1)
            for t, e in pairs
        ]
        assert [float(layers[name].by_task[t]) for t in TASKS] == pytest.approx(want)
        assert layers[name].positions == 2 * (3 * 4 - 2 + 2 * 4 - 2)


def test_sequential_is_one_layer_after_the_other() -> None:
    base, experts, merged = models()
    data = samples()
    found, report = mf.calibrate_features(base, experts, merged, data, sequential=True, clamp=None)
    layers = {x.name: x for x in report.layers}
    running = copy.deepcopy(merged)
    for name in LAYERS:
        want = [
            definition(*features((base, e, merged), name, data[t], running), "ratio_of_sums", 1)
            for t, e in zip(TASKS, experts, strict=True)
        ]
        assert [float(layers[name].by_task[t]) for t in TASKS] == pytest.approx(want, rel=1e-6)
        with torch.no_grad():
            for local, p in running.get_submodule(name).named_parameters():
                start = base.get_parameter(f"{name}.{local}")
                p.copy_(start + sum(want) / 2 * (p - start))
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, running.get_parameter(name), rtol=1e-6, atol=1e-6)


def test_one_shot_differs_from_sequential() -> None:
    base, experts, merged = models()
    one, two = (
        mf.calibrate_features(base, experts, merged, samples(), sequential=s)[1] for s in (0, 1)
    )
    first, last = (
        next(float(x.coefficient) for x in r.layers if x.name == "down") for r in (one, two)
    )
    assert abs(first - last) > 1e-4


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", ["llama_tied", "albert", "t5"])
def test_uses_pool_their_sums(family: str, sequential: bool) -> None:
    own = case(family)
    _, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, sequential=sequential
    )
    several = [x for x in report.layers if x.calls > 4]  # two tasks of two batches
    assert several
    group = next(x for x in several if x.tensors[0].endswith("weight"))
    parameter = dict(own.merged.named_parameters(remove_duplicate=False))[group.tensors[0]]
    decoder = {id(m) for m in own.merged.get_decoder().modules()} if family == "t5" else set()
    calls: list[tuple[str, Tensor]] = []
    for k, task in enumerate(TASKS):
        sums = [0.0, 0.0]
        for name, module in own.merged.named_modules():
            if getattr(module, "weight", None) is parameter:
                module.register_forward_pre_hook(lambda m, a, n=name: calls.append((n, a[0])))
        for batch in own.data[task]:
            calls.clear()
            with torch.no_grad():
                own.merged(**batch)
            for name, z in calls:
                parts = (own.base, own.experts[k], own.merged)
                with torch.no_grad():
                    start, expert, merged = (m.get_submodule(name).forward(z) for m in parts)
                keep = torch.ones(start.shape[:-1], dtype=torch.bool)
                mask = batch["attention_mask"]
                if mask.shape == keep.shape and id(own.merged.get_submodule(name)) not in decoder:
                    keep = mask.bool()
                sums[0] += float((expert - start)[keep].abs().sum())
                sums[1] += float((merged - start)[keep].abs().sum())
        for module in own.merged.modules():
            module._forward_pre_hooks.clear()
        assert float(group.by_task[task]) == pytest.approx(sums[0] / sums[1], rel=1e-4)


def test_settings_of_the_factor() -> None:
    base, experts, merged = models()

    def applied(**settings: Any) -> dict[str, float]:
        _, report = mf.calibrate_features(base, experts, merged, samples(), **settings)
        return {x.name: float(x.applied) for x in report.layers}

    raw = applied(clamp=None)
    assert max(raw.values()) > 1.2
    assert applied(clamp=(0.5, 1.1))["up"] == pytest.approx(min(raw["up"], 1.1))
    assert applied(strength=0.5, clamp=None)["up"] == pytest.approx(raw["up"] ** 0.5)
    assert applied(scale=2.0, clamp=None)["up"] == pytest.approx(2 * raw["up"])
    held = applied(sensitive=["up.weight", "norm"], clamp=None)
    assert held["up"] == min(raw["up"], 1) and held["norm"] == min(raw["norm"], 1)
    assert held["down"] == raw["down"]
    order = applied(sensitive=["norm", "up.weight"], clamp=None)
    assert order == held


def test_min_denominator() -> None:
    """A position whose merged feature nearly vanishes would rule the mean."""
    base, expert, merged = (nn.Linear(2, 1, bias=False) for _ in range(3))
    for layer, weight in ((base, (0, 0)), (expert, (1, 1)), (merged, (1, -1))):
        layer.weight.data = torch.tensor([weight], dtype=torch.float32)
    data = {"a": [torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.999]])]}
    plain, floored = (
        float(
            mf.calibrate_features(
                base, [expert], merged, data, reduction="mean", min_denominator=floor
            )[1].layers[0].coefficient
        )
        for floor in (0.0, 0.01)
    )  # fmt: skip
    assert plain == pytest.approx((1 + 1 + 1999) / 3, rel=1e-3)
    assert floored == pytest.approx(1.0)


def test_bfloat16_is_judged_in_float32() -> None:
    """Task features come from task vectors: rounding of activations does not enter."""
    base, experts, merged = (x for x in models())
    low = [copy.deepcopy(m).bfloat16() for m in (base, *experts, merged)]
    wide = [copy.deepcopy(m).double() for m in low]
    ids = {t: [{"input_ids": torch.tensor([[1, 2, 3]])}] for t in TASKS}
    got, want = (
        mf.calibrate_features(m[0], m[1:3], m[3], ids)[1].layers[0].coefficient for m in (low, wide)
    )
    assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_inputs_are_not_written_to() -> None:
    base, experts, merged = models()
    merged.train()
    everything = [base, *experts, merged]
    before = [copy.deepcopy(m.state_dict()) for m in everything]
    for sequential in (False, True):
        found, _ = mf.calibrate_features(base, experts, merged, samples(), sequential=sequential)
        assert found.training and found is not merged
        assert all(p.requires_grad for p in found.parameters())
    for model, state in zip(everything, before, strict=True):
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_state_dicts() -> None:
    base, experts, merged = models()
    module, _ = mf.calibrate_features(base, experts, merged, samples())
    state, _ = mf.calibrate_features(
        base.state_dict(), [e.state_dict() for e in experts], merged.state_dict(), samples(),
        model=copy.deepcopy(base),
    )  # fmt: skip
    assert isinstance(state, dict)
    assert all(torch.equal(state[n], t) for n, t in module.state_dict().items())


def test_experts_by_name() -> None:
    base, experts, merged = models()
    data = samples()
    one, _ = mf.calibrate_features(base, experts, merged, data)
    named = {TASKS[1]: experts[1], TASKS[0]: experts[0]}
    two, _ = mf.calibrate_features(base, named, merged, data)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_dual_is_weights_then_features() -> None:
    base, experts, merged = models()
    rough, _ = mf.calibrate_weights(base, experts, merged)
    middle = copy.deepcopy(merged)
    middle.load_state_dict(rough.state_dict())
    want, _ = mf.calibrate_features(base, experts, middle, samples())
    got, report = mf.calibrate_features(base, experts, merged, samples(), space="dual")
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert any(t.calibrated for t in report.tensors) and report.layers


def test_dual_knows_the_layout_of_gpt2() -> None:
    own = case("gpt2")
    _, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data, space="dual")
    assert len(report["transformer.h.0.attn.c_attn.weight"].coefficient) == 48  # outputs, of 16 in


def test_callable_data_is_read_again() -> None:
    base, experts, merged = models()
    data = samples()
    lists, _ = mf.calibrate_features(base, experts, merged, data, sequential=True)
    calls, _ = mf.calibrate_features(
        base, experts, merged, {t: (lambda t=t: iter(data[t])) for t in TASKS}, sequential=True
    )
    for a, b in zip(lists.parameters(), calls.parameters(), strict=True):
        assert torch.equal(a, b)


def test_any_layout_of_memory() -> None:
    """Weights that lie transposed in memory, and more of them than are taken at a time."""
    torch.manual_seed(0)
    base = nn.Linear(600, 500).double()
    expert, merged = moved(base, 1), moved(base, 2)
    data = {"a": [torch.randn(3, 600).double()]}
    want, _ = mf.calibrate_features(base, [expert], merged, data)
    for model in (base, expert, merged):
        model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    got, _ = mf.calibrate_features(base, [expert], merged, data)
    torch.testing.assert_close(got.weight, want.weight)
    assert float((got.weight - merged.weight).abs().max()) > 1e-4

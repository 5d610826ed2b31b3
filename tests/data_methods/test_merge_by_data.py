"""RegMean and Fisher merging against their formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import magic_fast as mf
from features.families import case, case_of, moved
from features.test_observed import floats, gpt_oss, mixtral, net, text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.norm = nn.Embedding(11, 6), nn.Linear(6, 9), nn.LayerNorm(9)
        self.down = nn.Linear(9, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down(self.norm(torch.relu(self.up(self.embed(input_ids)))))  # type: ignore[no-any-return]


TASKS = ("one", "two", "three")


def experts() -> list[nn.Module]:
    torch.manual_seed(0)
    base = Net().double()
    return [moved(base, seed, 0.3).eval() for seed in (1, 2, 3)]


def samples() -> dict[str, list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(5)
    found: dict[str, list[dict[str, Tensor]]] = {}
    for n, task in enumerate(TASKS):
        found[task] = []
        for _ in range(2):
            mask = torch.ones(4, 5, dtype=torch.long)
            mask[0, 2 + n :] = 0
            ids = torch.randint(0, 11, (4, 5), generator=g)
            found[task].append({"input_ids": ids, "attention_mask": mask})
    return found


def inputs(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the linear layers receive, without padding."""
    rows: dict[str, list[Tensor]] = {"up": [], "down": []}
    with torch.no_grad():
        for batch in batches:
            z = model.embed(batch["input_ids"][batch["attention_mask"].bool()])
            rows["up"].append(z)
            rows["down"].append(model.norm(torch.relu(model.up(z))))
    return {name: torch.cat(found) for name, found in rows.items()}


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
def test_regmean(off_diagonal: float, weights: tuple[float, ...] | None) -> None:
    models, data = experts(), samples()
    merged, report = mf.merge_by_data(models, data, off_diagonal=off_diagonal, weights=weights)
    share = torch.tensor(weights or (1.0,) * 3).double()
    share /= share.sum()
    seen = [inputs(m, data[t]) for m, t in zip(models, TASKS, strict=True)]
    for name in ("up", "down"):
        left, right = 0.0, 0.0
        for f, model, z in zip(share, models, seen, strict=True):
            gram = z[name].t() @ z[name] / len(z[name])
            gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
            left = left + f * gram
            right = right + f * gram @ model.get_submodule(name).weight.detach().t()
        want = torch.linalg.solve(left, right).t()
        torch.testing.assert_close(merged.get_submodule(name).weight, want, rtol=1e-6, atol=1e-8)
        assert report.positions[f"{name}.weight"] == sum(len(z[name]) for z in seen)
    for name in report.averaged:
        want = sum(f * m.get_parameter(name) for f, m in zip(share, models, strict=True))
        torch.testing.assert_close(merged.get_parameter(name), want, rtol=1e-12, atol=1e-12)
    assert report.averaged == ["embed.weight", "up.bias", "norm.weight", "norm.bias", "down.bias"]
    total = sum(p.numel() for p in merged.parameters())
    assert report.left == pytest.approx(1 - (6 * 9 + 9 * 4) / total)


def test_outputs_come_nearer() -> None:
    """RegMean minimises Σ_k ‖z_k·(W_k − W)ᵀ‖² with off_diagonal=1: no other matrix is better."""
    models, data = experts(), samples()
    merged, _ = mf.merge_by_data(models, data, off_diagonal=1.0)
    seen = [inputs(m, data[t])["up"] for m, t in zip(models, TASKS, strict=True)]

    def loss(weight: Tensor) -> float:
        return sum(
            float((z @ (m.up.weight - weight).t()).square().sum() / len(z))
            for m, z in zip(models, seen, strict=True)
        )

    best = loss(merged.up.weight.detach())
    for seed in range(5):
        noise = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed)).double()
        assert loss(merged.up.weight.detach() + 1e-3 * noise) > best


def test_fisher_without_gradients_is_the_diagonal() -> None:
    models, data = experts(), samples()
    merged, _ = mf.merge_by_data(models, data, "fisher")
    seen = [inputs(m, data[t])["down"] for m, t in zip(models, TASKS, strict=True)]
    squares = [z.square().mean(0) for z in seen]
    want = sum(s * m.down.weight for s, m in zip(squares, models, strict=True)) / sum(squares)
    torch.testing.assert_close(merged.down.weight, want, rtol=1e-6, atol=1e-8)


def test_fisher_with_gradients() -> None:
    """Squares of ∂ log p(y|x), sample by sample, y drawn."""
    models = [m.float() for m in experts()]
    data = {t: [{"input_ids": b["input_ids"]} for b in own] for t, own in samples().items()}
    merged, report = mf.merge_by_data(
        models, data, "fisher", gradients=True, normalize=False, floor=0.0, seed=3
    )
    assert report.averaged == [] and report.left == 0
    information = []
    for model, task in zip(models, TASKS, strict=True):
        generator = torch.Generator().manual_seed(3)
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        count = 0
        for batch in data[task]:
            with torch.no_grad():
                chances = torch.softmax(model(**batch).double(), -1)
            drawn = torch.multinomial(chances.reshape(-1, 4), 1, generator=generator)
            drawn = drawn.view(chances.shape[:-1])
            for row in range(len(drawn)):
                model.zero_grad()
                ids = batch["input_ids"][row : row + 1]
                nll = F.cross_entropy(model(ids)[0], drawn[row], reduction="sum")
                nll.backward()
                count += 1
                for n, p in model.named_parameters():
                    total[n] += p.grad**2
        information.append({n: x / count for n, x in total.items()})
    for name, got in merged.named_parameters():
        values = [m.get_parameter(name).detach() for m in models]
        weights = [x[name] for x in information]
        lower = sum(weights)
        want = torch.where(
            lower > 0, sum(w * v for w, v in zip(weights, values, strict=True)) / lower,
            sum(values) / 3,
        )  # fmt: skip
        torch.testing.assert_close(got.detach(), want, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_of_a_stack(make: Any) -> None:
    """[E, out, in] and [E, in, out]: each expert by the tokens routed to it."""
    own = case_of(make, text)
    merged, report = mf.merge_by_data(own.experts, own.data)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rows = [k for k in report.positions if k.startswith(f"{name}[")]
    assert rows and f"{name}[0:1]" in rows
    counted = 0
    left, right = 0.0, 0.0
    for k, task in enumerate(("first", "second")):
        model = own.experts[k]
        model.set_experts_implementation("eager")
        found: list[Any] = []
        experts = model.get_submodule("model.layers.0.mlp.experts")
        handle = experts.register_forward_pre_hook(lambda m, a, out=found: out.append(a))
        with torch.no_grad():
            for batch in own.data[task]:
                for row, length in enumerate(batch["attention_mask"].sum(1)):
                    model(**{n: v[row : row + 1, :length] for n, v in batch.items()})
        handle.remove()
        z = torch.cat([hidden[(to == 0).any(-1)] for hidden, to, _ in found]).double()
        counted += len(z)
        if len(z):
            gram = 0.9 * z.t() @ z / len(z)
            gram += torch.diag(gram.diagonal() / 0.9 * 0.1)
            stack = experts.gate_up_proj[0].detach().double()
            left = left + gram
            right = right + gram @ (stack.t() if make is mixtral else stack)
    assert report.positions[f"{name}[0:1]"] == counted
    want = torch.linalg.solve(left, right)
    got = merged.get_parameter(name)[0].double()
    torch.testing.assert_close(got if make is gpt_oss else got.t(), want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "clip", "llama_tied"])
def test_architectures(family: str) -> None:
    """One expert comes back; two are one module that runs; ties stay."""
    own = case(family)
    task = {"first": own.data["first"]}
    same, _ = mf.merge_by_data([own.experts[0]], task)
    for name, p in same.named_parameters():
        torch.testing.assert_close(p, own.experts[0].get_parameter(name), rtol=1e-5, atol=1e-6)
    merged, report = mf.merge_by_data(own.experts, own.data)
    assert report.left < 0.6 and type(merged) is type(own.base)
    with torch.no_grad():
        merged(**own.data["first"][0])
    if family == "llama_tied":
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_state_dicts_and_names() -> None:
    models, data = experts(), samples()
    want, _ = mf.merge_by_data(models, data)
    named = {t: m.state_dict() for t, m in zip(TASKS, models, strict=True)}
    got, _ = mf.merge_by_data(named, dict(reversed(data.items())), model=models[0])
    for name, value in want.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


def test_inputs_that_never_vary_keep_the_mean() -> None:
    """A column whose input is always 0, and a layer that nothing reaches."""
    models = [moved(net(lambda: nn.Linear(6, 2))(), seed, 0.3) for seed in (1, 2)]
    g = torch.Generator().manual_seed(0)
    data = {t: [floats(g) * torch.tensor([1.0, 1, 1, 1, 0])] for t in "ab"}
    merged, _ = mf.merge_by_data(models, data, off_diagonal=1.0)
    mean = (models[0][0].weight + models[1][0].weight) / 2
    torch.testing.assert_close(merged[0].weight[:, 4], mean[:, 4])
    assert float((merged[0].weight[:, :4] - mean[:, :4]).abs().max()) > 1e-3


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "regmeen"}, "method: expected one of regmean, fisher, got 'regmeen'."),
    "preset": ({"preset": "x"}, "preset: expected None or 'fusion_bench', got 'x'."),
    "off": (
        {"off_diagonal": 2.0},
        "off_diagonal for method 'regmean': expected 0 to 1, got 2.0.",
    ),
    "of_the_other": (
        {"method": "fisher", "off_diagonal": 0.5},
        "off_diagonal for method 'fisher': expected none, got 0.5.",
    ),
    "draws": (
        {"method": "fisher", "draws": 2},
        "draws for method 'fisher': expected none without gradients=True, got 2.",
    ),
    "theirs": (
        {"method": "fisher", "preset": "fusion_bench"},
        "gradients for method 'fisher' under preset 'fusion_bench': expected True, got none. "
        "FusionBench takes gradients.",
    ),
    "weights": (
        {"weights": (1.0, -1.0, 1.0)},
        "weights: expected 3 numbers >= 0, not all 0, got [1.0, -1.0, 1.0].",
    ),
    "data": (
        {"data": {"one": [torch.zeros(1, 2, dtype=torch.long)]}},
        "data: expected one task for each of 3 experts, got 1 (one). Tasks and experts go together "
        "in order, or by name where experts is a mapping.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str) -> None:
    arguments, message = MISTAKES[name]
    with pytest.raises(mf.InputError) as error:
        mf.merge_by_data(**({"experts": experts(), "data": samples()} | arguments))
    assert str(error.value) == message


def test_gradients_need_logits() -> None:
    models = [tf.BertModel(tf.BertConfig(
        vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    ))]  # fmt: skip
    with pytest.raises(mf.InputError, match=r"expected logits \[samples, …, classes\], got Base"):
        mf.merge_by_data(
            models, {"a": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]}, "fisher",
            gradients=True,
        )  # fmt: skip

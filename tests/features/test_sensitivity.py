"""``sensitive_layers``: both measures, what is enlarged, and when a list is called noise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from features.families import FAMILIES, average, case, case_of
from features.planted import Chain, planted, samples
from magic_fast.reference.sensitivity import differences_from_median, divergence


def by_hand(base: nn.Module, experts: list[nn.Module], x: Tensor, name: str) -> Tensor:
    """−KL in float64 of each sample, one tensor enlarged, everything spelled out."""
    merged = copy.deepcopy(base).double()
    rows = [dict(e.double().named_parameters()) for e in copy.deepcopy(experts)]
    start = dict(copy.deepcopy(base).double().named_parameters())
    with torch.no_grad():
        for n, p in merged.named_parameters():
            p.copy_(start[n] + sum(r[n] - start[n] for r in rows) / len(rows))
        plain = merged(x.double()).softmax(-1)
        own = merged.get_parameter(name)
        own.copy_(start[name] + 1.1 * (own - start[name]))
        other = merged(x.double()).softmax(-1)
        return -(plain * (plain / other).log()).sum(-1)


@pytest.mark.parametrize("together", [1, 3, None])
def test_scores_are_the_formula(together: int | None) -> None:
    base, experts = planted()
    x = samples()
    report = mf.sensitive_layers(base, experts, data={"a": [x[:10], x[10:]]}, together=together)
    assert report.samples == 24 and report.unperturbed == 0 and report.metric == "kl"
    assert list(report.scores) == [n for n, _ in base.named_parameters()]
    for name, score in report.scores.items():
        want = by_hand(base, experts, x, name).mean()
        # float32 logits: squares of 1e-7 against scores of 1e-9 and more
        assert score == pytest.approx(float(want), rel=2e-3, abs=1e-12)


def test_planted_layer_is_found() -> None:
    base, experts = planted()
    report = mf.sensitive_layers(base, experts, data={"a": samples()}, top=2)
    assert set(report.sensitive) == {"layers.3.weight", "layers.3.bias"}
    assert report.noise is False and report.significant == list(report.sensitive)
    assert not report.warnings
    by_module = mf.sensitive_layers(base, experts, data={"a": samples()}, by="module", top=1)
    assert by_module.sensitive == ("layers.3",)
    assert list(by_module.scores) == [*(f"layers.{k}" for k in range(5)), "head"]
    # both tensors at once: less than either alone
    assert by_module.scores["layers.3"] < report.scores["layers.3.weight"]


def test_accuracy_finds_it_too() -> None:
    """The authors' form: labels are what the merged model says."""
    base, experts = planted(300.0)
    merged = average(experts)
    x = samples(400)
    with torch.no_grad():
        labels = merged(x).argmax(-1)

    def right(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(x).argmax(-1) == labels

    report = mf.sensitive_layers(base, experts, right, by="module", perturbation=0, top=1)
    assert report.metric == "evaluate" and report.samples == 400
    assert report.sensitive == ("layers.3",) and report.noise is False
    assert report.unperturbed == float(right(merged).double().mean())
    number = mf.sensitive_layers(
        base, experts, lambda m: right(m).double().mean(), by="module", perturbation=0, top=1
    )
    assert number.scores == pytest.approx(report.scores) and number.noise is None
    assert number.intervals == {} and number.warnings == [
        "Whether the list of sensitive layers is noise is not known: one number was given. Let "
        "evaluate return the score of each sample."
    ]


def test_noise_is_called_noise() -> None:
    """Outcomes that have nothing to do with the layer."""
    base, experts = planted()
    draw = torch.Generator().manual_seed(0)
    report = mf.sensitive_layers(
        base, experts, lambda m: torch.rand(60, generator=draw) < 0.8, top=3
    )
    assert report.noise is True and report.significant == []
    assert report.warnings == [
        "The list of sensitive layers is noise: none of its 3 layers loses more than the median "
        "layer beyond chance (at 95%, on 60 samples). Measure on more samples, or calibrate "
        "without a list."
    ]
    same = mf.sensitive_layers(base, experts, lambda m: 0.5)
    assert same.noise is True and "all scores are equal" in same.warnings[0]


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_samples(count: int, tmp_path: Path) -> None:
    base, experts = planted()
    report = mf.sensitive_layers(base, experts, data={"a": samples(count)})
    assert report.noise is None and report.intervals == {}
    assert report.warnings[0].endswith(f"is not known: the samples are too few ({count}).")
    report.save(tmp_path / "few.json")
    assert mf.sensitive_from_file(tmp_path / "few.json") == report.sensitive


def test_partly_noise_is_said() -> None:
    base, experts = planted()
    report = mf.sensitive_layers(base, experts, data={"a": samples()}, top=9)
    assert report.noise is False and 0 < len(report.significant) < 9
    assert report.warnings[0].startswith(f"{len(report.significant)} of 9 sensitive layers lose")


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: torch.randn(60, 20, generator=g) + 3 * torch.randn(1, 20, generator=g),
        lambda g: -torch.randn(60, 20, generator=g).square() * torch.rand(1, 20, generator=g),
        lambda g: (torch.rand(60, 20, generator=g) < 0.7).double(),
    ],
    ids=["normal", "divergence", "accuracy"],
)
def test_chance_seldom_passes(draw: Any) -> None:
    """Of lists that are noise at most 5 % may pass; 100 draws, so 10 would be a 2 % surprise."""
    passed = 0
    for seed in range(100):
        scores = draw(torch.Generator().manual_seed(seed)).double()
        found, width = differences_from_median(scores, resamples=300, confidence=0.95, seed=seed)
        passed += bool((found + width < 0).any())
    assert passed <= 10


def test_a_real_difference_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 40, generator=generator) + 3 * torch.randn(1, 40, generator=generator)
    scores[7] -= 1.2
    found, width = differences_from_median(scores, resamples=1000, confidence=0.95, seed=0)
    assert [i for i in range(60) if found[i] + width[i] < 0] == [7]
    again = differences_from_median(scores, resamples=1000, confidence=0.95, seed=0)
    assert torch.equal(again[1], width)


def test_divergence() -> None:
    p, q = torch.tensor([0.0, 1.0, -torch.inf]), torch.tensor([1.0, 0.0, -torch.inf])
    a, b = (x[:2].double().softmax(-1) for x in (p, q))
    assert float(divergence(p, q)) == pytest.approx(float((a * (a / b).log()).sum()), rel=1e-14)


def test_padding_does_not_count() -> None:
    base = case("llama")
    batch = base.data["first"][0]
    longer = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in batch.items()}
    one, two = (
        mf.sensitive_layers(base.base, base.experts, data={"a": [b]}) for b in (batch, longer)
    )
    assert two.scores == pytest.approx(one.scores, rel=1e-3, abs=1e-13)
    single = [{k: v[n : n + 1, : 5 if n == 1 else 7] for k, v in batch.items()} for n in range(3)]
    three = mf.sensitive_layers(base.base, base.experts, data={"a": single})
    assert three.samples == 3 and three.scores == pytest.approx(one.scores, rel=1e-3, abs=1e-13)


@pytest.mark.parametrize(
    "family",
    [
        f if f in ("llama_tied", "t5", "clip") else pytest.param(f, marks=pytest.mark.slow)
        for f in FAMILIES
        if f != "albert"  # its output is no distribution
    ],
)
def test_one_by_one_is_together(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = case(family)
    calls = {"side_by_side": 0}
    vmap = torch.vmap

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["side_by_side"] += 1
        return vmap(*args, **kwargs)

    monkeypatch.setattr(torch, "vmap", counted)
    together = mf.sensitive_layers(own.base, own.experts, data=own.data, together=8)
    assert calls["side_by_side"] >= len(together.scores) // 8
    alone = mf.sensitive_layers(own.base, own.experts, data=own.data, together=1)
    # squares of what float32 rounds logits of 10 by; a key's bias has no effect but that
    assert together.scores == pytest.approx(alone.scores, rel=1e-3, abs=1e-11)
    assert together.samples == sum(
        len(next(iter(b.values()))) for batches in own.data.values() for b in batches
    )
    names = [n for n, _ in own.base.named_parameters()]  # a tied one once
    assert list(together.scores) == names


def test_a_model_that_does_not_vmap() -> None:
    class Branching(Chain):
        def forward(self, x: Tensor) -> Tensor:
            if self.layers[0].weight.sum().item() > 1e9:  # .item() of a batch has no meaning
                return x
            return super().forward(x)

    torch.manual_seed(0)
    base, experts = planted()
    plain = mf.sensitive_layers(base, experts, data={"a": samples()})
    other, own = Branching(), [Branching() for _ in experts]
    for into, source in zip((other, *own), (base, *experts), strict=True):
        into.load_state_dict(source.state_dict())
    found = mf.sensitive_layers(other, own, data={"a": samples()})
    assert found.scores == pytest.approx(plain.scores, rel=1e-3, abs=1e-12)


def test_bfloat16_is_measured_in_float32() -> None:
    """A tenth of a task vector is less than half a unit in the last place of most weights there."""
    own = case("llama")
    rough = [m.bfloat16() for m in (own.base, *own.experts)]
    wide = [copy.deepcopy(m).float() for m in rough]
    got = mf.sensitive_layers(rough[0], rough[1:], data=own.data)
    want = mf.sensitive_layers(wide[0], wide[1:], data=own.data)
    assert got.scores == pytest.approx(want.scores, rel=1e-3, abs=1e-13)
    assert max(got.scores.values()) < 0
    assert {p.dtype for m in rough for p in m.parameters()} == {torch.bfloat16}
    seen = []
    mf.sensitive_layers(rough[0], rough[1:], lambda m: seen.append(m) or 0.0, tensors="magic")
    assert {p.dtype for p in seen[0].parameters()} == {torch.float32}


def test_evaluate_sees_one_change_at_a_time_and_all_are_undone() -> None:
    base, experts = planted()
    merged = dict(average(experts).named_parameters())
    start = dict(base.named_parameters())
    seen: list[dict[str, Tensor]] = []

    def look(model: nn.Module) -> float:
        assert not model.training
        seen.append({n: p.clone() for n, p in model.named_parameters()})
        return float(len(seen))

    report = mf.sensitive_layers(base, experts, look, perturbation=0.5)
    assert report.unperturbed == 1.0
    for name, now in zip((None, *report.scores), seen, strict=True):
        for n, p in now.items():
            want = merged[n]
            if n == name:
                want = start[n] + 0.5 * (merged[n] - start[n])
            torch.testing.assert_close(p, want, rtol=1e-6, atol=1e-7)
            if n != name:  # exactly what it was
                assert torch.equal(p, seen[0][n])
    with pytest.raises(ZeroDivisionError):
        mf.sensitive_layers(base, experts, lambda m: 1 // 0)


def test_merged_and_states() -> None:
    base, experts = planted()
    merged = average(experts)
    x = samples()
    want = mf.sensitive_layers(base, experts, data={"a": x})
    given = mf.sensitive_layers(base, None, data={"a": x}, merged=merged)
    assert given.scores == pytest.approx(want.scores, rel=1e-3, abs=1e-12)
    states = [m.state_dict() for m in (base, *experts)]
    by_model = mf.sensitive_layers(states[0], states[1:], data={"a": x}, model=Chain())
    assert by_model.scores == pytest.approx(want.scores, rel=1e-3, abs=1e-12)

    def norm(state: dict[str, Tensor]) -> float:
        return -float(sum(t.norm() for t in state.values()))

    def module_norm(module: nn.Module) -> float:
        return norm(dict(module.named_parameters()))

    got = mf.sensitive_layers(states[0], states[1:], norm)
    like = mf.sensitive_layers(base, experts, module_norm)
    assert got.scores == pytest.approx(like.scores) and got.sensitive == like.sensitive
    named = mf.sensitive_layers(states[0], {"a": states[1], "b": states[2]}, norm, by="module")
    assert list(named.scores) == [*(f"layers.{k}" for k in range(5)), "head"]


def test_which_tensors() -> None:
    base, experts = planted()
    x = {"a": samples()}
    names = ["head.weight", "layers.1.bias"]
    one = mf.sensitive_layers(base, experts, data=x, tensors=names)
    two = mf.sensitive_layers(base, experts, data=x, tensors=names[::-1])
    assert one.scores == two.scores and set(one.scores) == set(names)
    general = mf.sensitive_layers(base, experts, data=x, tensors="general")
    matrices = {n for n, p in base.named_parameters() if p.dim() > 1}
    assert set(general.scores) == matrices - {"head.weight"}
    chosen = mf.TensorFilter(include=(r"layers\.[12]",), exclude=("bias",))
    some = mf.sensitive_layers(base, experts, data=x, tensors=chosen)
    assert list(some.scores) == ["layers.1.weight", "layers.2.weight"]


def test_other_outputs() -> None:
    class Two(Chain):
        def forward(self, x: Tensor) -> Any:
            return {"features": x, "answers": super().forward(x)}

    own = case_of(Two, lambda g: torch.randn(4, 6, generator=g))
    arguments: dict[str, Any] = {"base": own.base, "experts": own.experts, "data": own.data}
    with pytest.raises(mf.InputError, match=r"expected logits \[samples, …, classes\], got dict"):
        mf.sensitive_layers(**arguments)
    report = mf.sensitive_layers(**arguments, output=lambda found: found["answers"])
    assert len(report.scores) == 12 and report.samples == 16

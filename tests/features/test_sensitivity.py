"""``sensitive_layers``: both measures, what is enlarged, and when a list is called noise."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from features.families import FAMILIES, average, case, case_of, moved
from magic_fast.calibration.sensitive import is_sensitive, unknown_names
from magic_fast.reference.sensitivity import differences_from_median, divergence


class Chain(nn.Module):
    """Five square layers, one after another, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        return self.head(x)


def planted(size: float = 40.0) -> tuple[nn.Module, list[nn.Module]]:
    """Experts that moved ``layers.3`` far more than the rest."""
    torch.manual_seed(0)
    base = Chain().eval()
    experts = [moved(base, seed, 0.01) for seed in (1, 2)]
    with torch.no_grad():
        for expert in experts:
            for name, p in expert.layers[3].named_parameters():
                start = base.layers[3].get_parameter(name)
                p.copy_(start + size * (p - start))
    return base, experts


def samples(count: int = 24, seed: int = 5) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


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
    assert set(general.scores) == {n for n, p in base.named_parameters() if p.dim() > 1}
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


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "neither": (
        {"data": None},
        "evaluate, data: expected one of them, got neither. A function of the model gives the "
        "authors' measure; batches of each task give the divergence, which needs no labels.",
    ),
    "both": (
        {"evaluate": float},
        "evaluate, data: expected one of them, got both. A function of the model gives the "
        "authors' measure; batches of each task give the divergence, which needs no labels.",
    ),
    "no_tasks": (
        {"data": {}},
        "data: expected batches of at least one task, as {task: batches}, got none.",
    ),
    "a_list": (
        {"data": [1]},
        "data: expected batches of at least one task, as {task: batches}, got list.",
    ),
    "no_batches": (
        {"data": {"a": []}},
        "data of task 'a': expected at least one batch, got none. An iterator that was used before "
        "gives nothing: pass a list, or a callable.",
    ),
    "empty": (
        {"data": {"a": torch.ones(0, 6)}},
        "batch 0 of task 'a': expected at least one sample, got an empty one.",
    ),
    "wrong_modality": (
        {"data": {"a": [{"pixel_values": torch.ones(1, 6)}]}},
        "batch 0 of task 'a': expected what the model takes, got its refusal, TypeError: "
        "Chain.forward() got an unexpected keyword argument 'pixel_values'. Is the data of the "
        "right modality?",
    ),
    "unknown_tensors": (
        {"tensors": ["head.weight", "heads.weight", "x"]},
        "tensors: expected names of the model's tensors, got 'heads.weight' (and 1 more), which it "
        "does not have. Check the list against the model's names.",
    ),
    "no_tensors": (
        {"tensors": mf.TensorFilter(include=("nothing",))},
        "tensors: expected at least one of the model's tensors, got none.",
    ),
    "by": ({"by": "row"}, "by: expected 'tensor' or 'module', got 'row'."),
    "perturbation": (
        {"perturbation": 1},
        "perturbation: expected a factor other than 1, which changes nothing.",
    ),
    "perturbation_nan": (
        {"perturbation": float("nan")},
        "perturbation: expected a finite factor, got nan. 1.1 enlarges a layer's change by a "
        "tenth.",
    ),
    "top": ({"top": 0}, "top: expected a whole number of at least 1, got 0."),
    "together": ({"together": True}, "together: expected a whole number of at least 1, got True."),
    "confidence": ({"confidence": 1}, "confidence: expected a number between 0 and 1, got 1."),
    "resamples": ({"resamples": 9}, "resamples: expected a whole number of at least 100, got 9."),
    "a_word": (
        {"data": None, "evaluate": lambda m: "good"},
        "evaluate for the model as it is: expected a number or one for each sample, got str.",
    ),
    "nan": (
        {"data": None, "evaluate": lambda m: float("nan")},
        "evaluate for the model as it is: expected finite scores, got NaN or infinity.",
    ),
    "output_of_evaluate": (
        {"data": None, "evaluate": float, "output": float},
        "output: expected it with data, got it with evaluate. Leave it out.",
    ),
    "one_class": (
        {"output": lambda found: found[:, :1]},
        "output of the model for batch 0 of task 'a': expected logits of at least two classes, got "
        "one. Give an evaluation of your own (evaluate=).",
    ),
    "nan_outputs": (
        {"output": lambda found: found * torch.nan},
        "output of the model for batch 0 of task 'a', 'layers.0.weight' enlarged: expected finite "
        "logits, got NaN or infinity.",
    ),
    "no_experts": ({"experts": []}, "experts: expected at least one, got none."),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str) -> None:
    base, experts = planted()
    changes, message = MISTAKES[name]
    arguments = {"base": base, "experts": experts, "data": {"a": samples()}} | changes
    with pytest.raises(mf.InputError, match=f"^{re.escape(message)}$"):
        mf.sensitive_layers(**arguments)


def test_more_mistakes() -> None:
    base, experts = planted()
    counts = iter((4, 5))
    with pytest.raises(
        mf.InputError,
        match=r"^evaluate for 'layers.0.weight' enlarged: expected 4 numbers as for the model as "
        r"it is, got 5 numbers\. Evaluate the same samples each time\.$",
    ):
        mf.sensitive_layers(base, experts, lambda m: torch.ones(next(counts)))
    states = [m.state_dict() for m in (base, *experts)]
    with pytest.raises(mf.InputError, match=r"^model: expected a module that runs the data"):
        mf.sensitive_layers(states[0], states[1:], data={"a": samples()})
    with pytest.raises(
        mf.InputError, match=r"^tensor 'layers.0.weight' in model: expected one as in"
    ):
        mf.sensitive_layers(states[0], states[1:], data={"a": samples()}, model=nn.Linear(6, 6))
    own = case("llama")
    batch = {k: v.clone() for k, v in own.data["first"][0].items()}
    batch["attention_mask"][1] = 0
    with pytest.raises(
        mf.InputError,
        match=r"^batch 0 of task 'a': expected samples of at least one token, got one of padding",
    ):
        mf.sensitive_layers(own.base, own.experts, data={"a": [batch]})


def test_file_and_back(tmp_path: Path) -> None:
    base, experts = planted()
    report = mf.sensitive_layers(base, experts, data={"a": samples()}, top=3)
    path = tmp_path / "new" / "sensitive.json"
    report.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["sensitive.json"]
    found = json.loads(path.read_text())
    assert found["scores"] == report.scores
    assert list(found["scores"]) == sorted(report.scores, key=lambda n: report.scores[n])
    for key in ("metric", "perturbation", "samples", "noise", "intervals", "top", "sensitive"):
        assert key in found
    assert mf.sensitive_from_file(path) == report.sensitive
    assert mf.sensitive_from_file(path, top=1) == report.sensitive[:1]
    with pytest.raises(mf.OutputError, match="expected a file that can be written"):
        report.save(path / "below")


def test_list_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "scores.json"
    scores = {"b": 0.5, "c": 0.5, "a": 0.5, "d": 0.1}
    for order in (scores, dict(reversed(scores.items()))):
        path.write_text(json.dumps(order))
        assert mf.sensitive_from_file(path, top=2) == ("d", "a")  # equal ones by name
    path.write_text(json.dumps({str(k): k for k in range(30)}))
    assert len(mf.sensitive_from_file(path)) == 10
    path.write_text(json.dumps({"scores": scores, "top": 3, "noise": True}))
    assert mf.sensitive_from_file(path) == ("d", "a", "b")
    assert "it was found to be noise when it was measured" in caplog.text
    for text, message in (
        ('{"a": true}', "expected a list of names or an object of name: score, got dict"),
        ('{"a": NaN}', "expected a finite score of 'a', got nan"),
        ('{"scores": {"a": 1}, "top": "x"}', "expected a whole number of at least 1 as top"),
        ("[1]", "expected a list of names or an object of name: score, got list"),
        ("{", "expected a JSON file"),
    ):
        path.write_text(text)
        with pytest.raises(mf.InputError, match=re.escape(message)):
            mf.sensitive_from_file(path)


def test_a_module_stands_for_what_is_in_it() -> None:
    assert is_sensitive("a.b.weight", {"a.b"}) and is_sensitive("a.b.weight", {"a"})
    assert not is_sensitive("a.bc.weight", {"a.b"})
    assert unknown_names(["a", "a.b", "b"], ["a.b.weight"]) == ["b"]
    base, experts = planted()
    merged = average(experts)
    by_tensor, by_module = (
        mf.calibrate_weights(
            base, experts, merged, calibration=mf.WeightCalibration(sensitive=names)
        )[0]
        for names in (["layers.3.weight", "layers.3.bias"], ["layers.3"])
    )
    free, _ = mf.calibrate_weights(base, experts, merged)
    assert all(torch.equal(by_tensor[n], by_module[n]) for n in by_tensor)
    assert not torch.equal(free["layers.3.weight"], by_module["layers.3.weight"])
    with pytest.raises(mf.InputError, match=r"^sensitive tensor 'layers.9': expected a tensor of"):
        mf.calibrate_weights(
            base, experts, merged, calibration=mf.WeightCalibration(sensitive=["layers.9"])
        )


@pytest.mark.parametrize("space", ["feature", "dual"])
def test_a_container_holds_its_layers_back(space: str) -> None:
    base, experts = planted()
    data = {"a": samples(), "b": samples(seed=6)}
    found = [
        mf.calibrate_features(
            base, experts, average(experts), data, space=space, sensitive=names, clamp=None
        )
        for names in (["layers"], [f"layers.{k}" for k in (4, 2, 0, 1, 3)])
    ]
    for (one, report), (two, _) in (found, found[::-1]):
        for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            assert torch.equal(p, q), name
        held = [x for x in report.layers if x.name.startswith("layers")]
        assert all(float(x.applied) <= 1 for x in held)
        assert any(float(x.coefficient) > 1 for x in held)

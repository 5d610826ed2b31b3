"""A merge written into a model: the values of ``merge``, and all or nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from api.networks import Network, copies, networks
from magic_fast.api.tensors import bounds
from magic_fast.api.tensors import merge_into as merging_into
from magic_fast.errors import BackendError, InputError, NonFiniteError
from magic_fast.methods import registry

METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "ties of the whole model": {"density": 0.3, "preset": "ties_merging"},
    "average": {"calibrate": "wsc"},
    "dare_linear": {"density": 0.5, "seed": 3},
    "della": {"density": 0.5, "epsilon": 0.2, "rescale": "l1"},
    "pcb": {},  # looks at the whole model first
    "multislerp": {},  # may refuse a tensor by its values
}


def _models() -> tuple[Network, list[Network]]:
    return Network(0), networks(3)


def _same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[n], state[n]) for n in own)


@pytest.mark.parametrize("place", ["of its own", "the base", "an expert"])
@pytest.mark.parametrize("word", METHODS)
def test_the_values_are_those_of_merge(word: str, place: str) -> None:
    base, experts = _models()
    method, parameters = word.split()[0], METHODS[word]
    expected = mf.merge(base, experts, method, **parameters).state_dict()
    model = {"of its own": Network(9), "the base": base, "an expert": experts[1]}[place]
    others = [m for m in (base, *experts) if m is not model]
    before = [copies(m) for m in others]
    rotary, tied, held = model.rotary.clone(), model.embed.weight, model.embed.weight.data_ptr()
    assert mf.merge_into(model, base, experts, method, **parameters) is model
    assert _same(model, expected)
    assert model.head.weight is tied and tied.data_ptr() == held and tied.requires_grad
    assert torch.equal(model.rotary, rotary)
    assert all(_same(m, state) for m, state in zip(others, before, strict=True))


def test_dtype_and_strides_of_the_model_stay() -> None:
    base, experts = _models()
    model: Any = Network(9).to(memory_format=torch.channels_last).to(torch.bfloat16)
    strides = model.conv.weight.stride()
    assert not model.conv.weight.is_contiguous()
    mf.merge_into(model, base, experts, "ties", density=0.3)
    for name, tensor in model.state_dict().items():
        row = [m.state_dict()[name] for m in (base, *experts)]
        if not tensor.is_floating_point():
            continue
        assert tensor.dtype == torch.bfloat16
        out = torch.empty(tensor.shape, dtype=torch.bfloat16)
        if "running_" in name:  # the experts' mean
            mf.merge(row[0], row[1:], "average", out=out)
        else:
            mf.merge(row[0], row[1:], "ties", density=0.3, out=out)
        assert torch.equal(tensor, out), name
    assert model.conv.weight.stride() == strides


def test_state_dicts_and_no_base() -> None:
    base, experts = _models()
    expected = mf.merge(None, [base, *experts], "linear").state_dict()
    state = copies(base)
    held = {n: t.data_ptr() for n, t in state.items()}
    found = mf.merge_into(state, None, [base.state_dict(), *experts], "linear")
    assert found is state
    assert all(torch.equal(state[n], expected[n]) for n in state)
    assert {n: t.data_ptr() for n, t in state.items()} == held


def test_the_memory_on_top_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is its own base so many bytes of results are held, or one tensor."""
    monkeypatch.setattr(merging_into, "_SCRATCH_BYTES", 1000)
    held: list[int] = []
    own = merging_into.run

    def counted(jobs: Any, call: Any) -> Any:
        sizes = [j.out.numel() * j.out.element_size() for j in jobs]
        held.append(sum(sizes) if len(sizes) > 1 else min(sizes[0], 1000))
        return own(jobs, call)

    monkeypatch.setattr(merging_into, "run", counted)
    base, experts = _models()
    expected = mf.merge(base, experts, "ties", density=0.3).state_dict()
    mf.merge_into(base, base, experts, "ties", density=0.3)
    assert _same(base, expected)
    assert len(held) > 2 and max(held) <= 1000


def test_a_model_of_its_own_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    outs: list[int] = []
    own = merging_into.run

    def seen(jobs: Any, call: Any) -> Any:
        outs.extend(j.out.data_ptr() for j in jobs)
        return own(jobs, call)

    monkeypatch.setattr(merging_into, "run", seen)
    base, experts = _models()
    model = Network(9)
    mf.merge_into(model, base, experts, "average")
    floats = {t.data_ptr() for t in model.state_dict().values() if t.is_floating_point()}
    assert set(outs) == floats and len(outs) == len(floats)


def _poison(expert: Network, value: float) -> None:
    with torch.no_grad():
        expert.norm.bias[5] = value


@pytest.mark.parametrize("method", ["average", "ties", "pcb", "karcher"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_input_leaves_the_model_as_it_was(method: str, value: float) -> None:
    base, experts = _models()
    model = Network(9)
    _poison(experts[2], value)
    before = copies(model)
    with pytest.raises(NonFiniteError) as caught:
        mf.merge_into(model, base, experts, method)
    assert str(caught.value) == (
        "NaN or infinity in expert 2 for 'norm.bias': expected finite values, got one at flat "
        "index 5. Repair the checkpoint, or pass nonfinite='propagate' to let it through."
    )
    assert _same(model, before)


def test_a_bad_base_is_named() -> None:
    base, experts = _models()
    _poison(base, math.nan)
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in the base for 'norm\.bias'"):
        mf.merge_into(Network(9), base, experts, "average")


def test_what_propagates_is_written() -> None:
    base, experts = _models()
    _poison(experts[0], math.inf)
    model = Network(9)
    mf.merge_into(model, base, experts, "average", nonfinite="propagate")
    assert not math.isfinite(float(model.norm.bias[5].detach()))
    assert bool(model.embed.weight.isfinite().all())


OVERFLOWS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "sum": lambda: ("task_arithmetic", {"scale": 1.0, "weights": 30000.0}),
    "scale": lambda: ("ties", {"density": 0.5, "scale": 60000.0}),
    "kept": lambda: ("dare_linear", {"density": 0.05, "scale": 1e4, "seed": 1}),
    "restored": lambda: ("della_linear", {"density": 0.5, "rescale": "l1", "scale": 1e5}),
    "signs": lambda: ("linear", {"weights": [1.0, 1.0, -1.9999999]}),
    "calibrated": lambda: ("average", {"calibrate": {"scale": 1e6}}),
}


@pytest.mark.parametrize("word", OVERFLOWS)
def test_an_overflow_leaves_the_model_as_it_was(word: str) -> None:
    method, parameters = OVERFLOWS[word]()
    base, experts = _models()
    model = Network(9).half()
    before = copies(model)
    start = None if method == "linear" else base
    with pytest.raises(NonFiniteError) as caught:
        mf.merge_into(model, start, experts, method, **parameters)
    assert "expected values within F16, got an overflow" in str(caught.value)
    assert _same(model, before)


def test_an_entry_that_one_expert_changed_alone_may_overflow() -> None:
    one, other = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    base, experts = (
        {"a": torch.zeros(4), "b": torch.zeros(4)},
        [{"a": x, "b": x} for x in (one, other)],
    )
    model = {"a": torch.zeros(4).half(), "b": torch.zeros(4).half()}
    call = partial(mf.merge_into, model, base, experts, "ramplus_tl", alpha=1.0)
    with pytest.raises(NonFiniteError, match=r"'a'.*expected values within F16, got an overflow"):
        call(r=1e5)
    assert not model["a"].any() and not model["b"].any()
    call(r=1e4)
    assert model["b"][2] == 10000.0  # 1 + r · min(overlap ÷ alone, α), rounded to float16


def test_a_method_that_refuses_by_values_leaves_the_model_as_it_was() -> None:
    states = [{"a": torch.ones(4), "b": torch.eye(3)[k] - 1 / 3} for k in range(3)]
    model = {"a": torch.zeros(4), "b": torch.zeros(3)}
    with pytest.raises(InputError, match="'b'"):
        mf.merge_into(model, None, states, "multislerp")
    assert not model["a"].any() and not model["b"].any()


def test_only_what_may_overflow_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    own = merging_into.run

    def counted(jobs: Any, call: Any) -> Any:
        runs.append(len(jobs))
        return own(jobs, call)

    monkeypatch.setattr(merging_into, "run", counted)
    base, experts = _models()
    mf.merge_into(Network(9).half(), base, experts, "ties", density=0.3)
    assert len(runs) == 1
    runs.clear()
    mf.merge_into(Network(9), base, experts, "karcher")
    assert len(runs) == 1
    runs.clear()
    mf.merge_into(Network(9).half(), base, experts, "karcher")
    assert len(runs) == 2


@pytest.mark.parametrize("word", METHODS)
def test_no_result_exceeds_its_bound(word: str) -> None:
    """Against what it is for: the largest result of random models."""
    base, experts = _models()
    method, parameters = word.split()[0], METHODS[word]
    seen: list[tuple[Any, float]] = []
    own = bounds.bound

    def kept(job: Any, largest: float, *, is_recipe: bool) -> float:
        found = own(job, largest, is_recipe=is_recipe)
        seen.append((job.name, found))
        return found

    model = Network(9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging_into, "bound", kept)
        spec = replace(registry.find_method(method), may_refuse=False)
        patch.setitem(registry._loaded, method, spec)
        mf.merge_into(model, base, experts, method, **parameters)
    assert len(seen) == 7
    for name, found in seen:
        assert float(model.state_dict()[name].abs().max()) <= found


def _as_view() -> Any:
    memory = torch.zeros(3, 4)
    return {"a": memory, "b": memory[1:]}


def _crossed() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = {"a": torch.zeros(4), "b": torch.ones(4)}
    return model, {"a": model["b"], "b": model["a"]}


def _mistakes() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    base, experts = _models()
    state = {"a": torch.zeros(3, 4), "b": torch.zeros(2, 4)}
    model, other = _crossed()
    three = {"a": torch.zeros(3)}
    number = {"ids": torch.tensor([1])}
    return {
        "a tensor": (
            lambda: mf.merge_into(torch.zeros(1), torch.zeros(1), [torch.zeros(1)]),
            InputError,
            "model: expected a module or a state dict, got a tensor. merge() has out= for tensors.",
        ),
        "other architecture": (
            lambda: mf.merge_into(nn.Linear(1, 1), base, experts, "average"),
            InputError,
            "tensor 'weight' in base: expected one as in the model, got none. All models must "
            "have the same architecture.",
        ),
        "other shape": (
            lambda: mf.merge_into({"a": torch.zeros(2)}, three, [three]),
            InputError,
            "shape of 'a' in the model: expected (3,) as in base, got (2,). All models must have "
            "the same architecture.",
        ),
        "other kind of numbers": (
            lambda: mf.merge_into(three, None, [{"a": torch.tensor([1, 2, 3])}], "linear"),
            InputError,
            "dtype of 'a' in the model: expected torch.int64 as in experts[0], got torch.float32.",
        ),
        "integers differ": (
            lambda: mf.merge_into(number, number, [{"ids": torch.tensor([2])}], "average"),
            InputError,
            "integer tensor 'ids' in experts[0]: expected the values of base, got others. Integer "
            "tensors are not merged; they must agree.",
        ),
        "a view of itself": (
            lambda: mf.merge_into(_as_view(), state, [state], "average"),
            InputError,
            "tensor 'b' of the model: expected memory of its own, got memory that overlaps 'a'. "
            "Merge into a model without such views.",
        ),
        "another tensor of an input": (
            lambda: mf.merge_into(model, other, [other], "average"),
            InputError,
            "tensor 'b' of the model: expected memory of its own, got memory that overlaps 'a' of "
            "base, which is still to be read. Copy that one first.",
        ),
        "backend": (
            lambda: mf.merge_into(Network(9).double(), base, experts, "average", backend="native"),
            BackendError,
            "backend 'native' for 'embed.weight': expected one that can run this merge, got: "
            "native: it takes float32, float16 and bfloat16, not torch.float64. See "
            "magic_fast.backends() or `magic-fast doctor`.",
        ),
        "no base": (
            lambda: mf.merge_into(Network(9), None, experts, "ties"),
            InputError,
            "base for method 'ties': expected a tensor or a state dict, got None. Use "
            "merge_task_vectors() where the experts are task vectors already.",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("word", list(_mistakes()))
def test_mistakes(word: str) -> None:
    call, kind, message = _mistakes()[word]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_a_mistake_leaves_the_model_as_it_was() -> None:
    base, experts = _models()
    model = Network(9)
    before = copies(model)
    with torch.no_grad():
        experts[2].head.weight[0, 0] = float("nan")  # of the last tensor
    with pytest.raises(NonFiniteError):
        mf.merge_into(model, base, experts, "average")
    assert _same(model, before)


def test_a_deep_copy_of_the_base_is_no_alias() -> None:
    base, experts = _models()
    model = copy.deepcopy(base)
    before = copies(base)
    mf.merge_into(model, base, experts, "average")
    assert _same(base, before) and not _same(model, before)


def test_counters_are_the_base(caplog: pytest.LogCaptureFixture) -> None:
    """They differ in every fine-tune with batch norm."""
    base, experts = _models()
    for number, model in enumerate((base, *experts)):
        model.norm.num_batches_tracked.fill_(number + 3)
    merged = mf.merge(base, experts, "average")
    assert merged.norm.num_batches_tracked.item() == 3
    assert "counter norm.num_batches_tracked stays as in base" in caplog.text
    assert mf.merge_into(Network(9), base, experts, "average").norm.num_batches_tracked.item() == 3

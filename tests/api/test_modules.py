"""Modules in, a module out."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import magic_fast as mf
from api.networks import Network, copies, networks
from magic_fast.errors import InputError


def test_a_module_gives_a_module_with_the_values_of_its_state_dict() -> None:
    base, experts = Network(0), networks(3)
    base.embed.weight.requires_grad_(False)
    before = copies(base)
    merged = mf.merge(base, experts, "ties", density=0.3)
    expected = mf.merge(base.state_dict(), [e.state_dict() for e in experts], "ties", density=0.3)
    assert type(merged) is Network
    assert list(merged.state_dict()) == list(expected)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert merged.head.weight is merged.embed.weight
    assert not merged.head.weight.requires_grad
    assert merged.conv.weight.requires_grad
    assert torch.equal(merged.rotary, base.rotary)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_the_kind_is_that_of_the_base() -> None:
    base, experts = Network(0), networks(2)
    states = [e.state_dict() for e in experts]
    assert isinstance(mf.merge(base, states, "average"), Network)
    assert isinstance(mf.merge(base.state_dict(), experts, "average"), dict)
    assert isinstance(mf.merge(None, experts, "linear"), Network)
    assert isinstance(mf.merge(None, states, "linear"), dict)
    found = mf.merge(base, experts, "ties", density=0.3, details=True)
    assert isinstance(found.merged, Network)
    assert set(found.thresholds) == {
        "embed.weight", "conv.weight", "conv.bias", "norm.weight", "norm.bias",
        "norm.running_mean", "norm.running_var",
    }  # fmt: skip


def test_tied_weights_are_merged_once() -> None:
    """Under the first name: the mask of the second is another one."""
    base, experts = Network(0), networks(2)
    merged = mf.merge(base, experts, "dare_linear", density=0.5, seed=1)
    rows = [e.embed.weight.detach() for e in experts]
    own = mf.merge(
        base.embed.weight.detach(), rows, "dare_linear", density=0.5, seed=1, name="embed.weight"
    )
    assert torch.equal(merged.embed.weight, own)


def test_files_hold_tied_weights_once() -> None:
    base, experts = Network(0), networks(2)
    states = [dict(e.state_dict()) for e in experts]
    del states[0]["head.weight"]
    del states[1]["embed.weight"]
    merged = mf.merge(base, states, "average")
    expected = mf.merge(base, experts, "average")
    assert torch.equal(merged.embed.weight, expected.embed.weight)


def test_the_axis_of_the_output_units_follows_the_architecture() -> None:
    """GPT-2 has its weights [in, out]."""

    class Config:
        model_type = "gpt2"

    base, *experts = (nn.Sequential() for _ in range(3))
    for k, model in enumerate((base, *experts)):
        torch.manual_seed(k)
        model.config = Config()
        model.add_module("c_fc", nn.Linear(4, 3, bias=False))
    merged = mf.merge(base, experts, "average", calibrate="wsc")
    rows = [e.get_parameter("c_fc.weight").detach() for e in experts]
    expected = mf.merge(
        base.get_parameter("c_fc.weight").detach(), rows, "average", calibrate="wsc", row_axis=1
    )
    assert torch.equal(merged.get_parameter("c_fc.weight"), expected)


def _untied(seed: int) -> Network:
    model = Network(seed)
    model.head.weight = nn.Parameter(model.head.weight.detach() + 1)
    return model


def _with_state(state: object) -> nn.Module:
    class Stateful(nn.Module):
        def get_extra_state(self) -> object:
            return state

    return Stateful()


def _uncopyable() -> nn.Module:
    model = nn.Linear(1, 1)
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("base", "experts", "message"),
    [
        (
            Network(0),
            [Network(1), _untied(2)],
            "tensors 'embed.weight' and 'head.weight' in experts[1]: expected the same values, "
            "because they are tied in the model, got different ones. Untie them in the model, or "
            "merge state dicts.",
        ),
        (
            Network(0),
            [nn.Linear(1, 1)],
            "tensor 'embed.weight' in experts[0]: expected one as in the model, got none. "
            "All models must have the same architecture.",
        ),
        (
            nn.Linear(1, 1, bias=False),
            [nn.Linear(1, 1)],
            "tensor 'bias' in the model: expected one as in experts[0], got none. "
            "All models must have the same architecture.",
        ),
        (
            nn.Linear(1, 1),
            [torch.zeros(1)],
            "experts[0]: expected a module or a state dict, got a tensor.",
        ),
        (
            _uncopyable(),
            [nn.Linear(1, 1)],
            "Linear: expected a module that can be copied, got: cannot pickle '_thread.lock' "
            "object. Merge state dicts, or use merge_into().",
        ),
    ],
    ids=["untied", "missing", "more", "tensor", "not copyable"],
)  # fmt: skip
def test_mistakes(base: nn.Module, experts: list[object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        mf.merge(base, experts, "average")
    assert str(caught.value) == message


@pytest.mark.parametrize("state", [{"scale": 1.0}, torch.ones(2)])
def test_extra_state_stays(state: object, caplog: pytest.LogCaptureFixture) -> None:
    base, expert = nn.Sequential(nn.Linear(1, 1), _with_state(state)), nn.Linear(1, 1)
    merged = mf.merge(base, [nn.Sequential(expert, _with_state(state))], "average")
    assert torch.equal(merged[0].weight, expert.weight)
    assert "extra state of '1' is not merged: it stays as it is" in caplog.text


def test_out_is_no_module() -> None:
    base = Network(0)
    with pytest.raises(InputError) as caught:
        mf.merge(base, networks(1), "average", out=copy.deepcopy(base))
    assert str(caught.value) == (
        "out: expected a tensor or a dict like the inputs, got a module. merge_into() writes into "
        "modules."
    )

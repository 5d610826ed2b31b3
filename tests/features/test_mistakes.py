"""Bad input to ``calibrate_features``: what it says; and what is undefined: what it does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import magic_fast as mf
from features.families import TASKS, average, case, moved
from features.test_coefficients import Net, models, samples


def _net(**changes: Any) -> dict[str, Any]:
    base, experts, merged = models()
    return {"base": base, "experts": experts, "merged": merged, "data": samples()} | changes


def _both(value: Any) -> dict[str, Any]:
    return {task: value for task in TASKS}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no_data_for_a_task": (
        {"data": {"first": [{"input_ids": torch.ones(1, 2, dtype=torch.long)}], "second": []}},
        "data of task 'second': expected at least one batch, got none. An iterator that was used "
        "before gives nothing: pass a list, or a callable.",
    ),
    "fewer_tasks": (
        {"data": {"first": [torch.ones(1)]}},
        "data: expected one task for each of 2 experts, got 1 (first). Tasks and experts go "
        "together in order, or by name where experts is a mapping.",
    ),
    "empty_batch": (
        {"data": _both([{"input_ids": torch.ones(0, 2, dtype=torch.long)}])},
        "batch 0 of task 'first': expected at least one sample, got an empty one.",
    ),
    "wrong_modality": (
        {"data": _both([{"pixel_values": torch.ones(1, 3, 4, 4)}])},
        "batch 0 of task 'first': expected what the model takes, got its refusal, TypeError: "
        "Net.forward() got an unexpected keyword argument 'pixel_values'. It was called with 1 "
        "named argument, pixel_values=[1, 3, 4, 4]. Is the data of the right modality?",
    ),
    "data_is_a_word": (
        {"data": _both("file.jsonl")},
        "data of task 'first': expected an iterable of batches or a callable that gives one, got "
        "str.",
    ),
    "sensitive": (
        {"sensitive": ["up.weight", "upp"]},
        "sensitive layer 'upp': expected a module or a tensor of the model, got an unknown name. "
        "Check the list against the model's names.",
    ),
    "sensitive_word": (
        {"sensitive": "up"},
        "calibration sensitive: expected a list of names, got the string 'up'. Read a file of "
        "scores with sensitive_from_file().",
    ),
    "reduction": (
        {"reduction": "max"},
        "calibration reduction: expected one of 'ratio_of_sums', 'mean', 'median', got 'max'.",
    ),
    "p": ({"p": 0.5}, "calibration p: expected an integer >= 1 or 'inf', got 0.5."),
    "clamp": (
        {"clamp": (2, 1)},
        "calibration clamp: expected (low, high) with 0 <= low <= high, got (2, 1).",
    ),
    "floor": (
        {"min_denominator": 1.0},
        "calibration min_denominator: expected a share in [0, 1), got 1.0.",
    ),
    "space": ({"space": "weight"}, "space: expected 'feature' or 'dual', got 'weight'."),
    "deploy": ({"deploy": "x"}, "calibration deploy: expected one of 'fold', 'hooks', got 'x'."),
    "magic_fold": (
        {"preset": "magic"},
        "deploy: expected 'hooks' under preset 'magic', got 'fold'. Its ratios per position cannot "
        "be folded into weights.",
    ),
    "merged_is_no_module": (
        {"merged": {"w": torch.ones(2)}},
        "merged: expected a module, whose layers can be run, got dict. Pass a module of the "
        "architecture as model=.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("sequential", [False, True], ids=["", "sequential"])
def test_mistake(name: str, sequential: bool) -> None:
    changes, message = MISTAKES[name]
    with pytest.raises(mf.InputError, match=f"^{re.escape(message)}$"):
        mf.calibrate_features(**_net(**changes), sequential=sequential)


def test_experts_of_another_architecture() -> None:
    torch.manual_seed(0)
    arguments = _net()
    arguments["experts"][1].up = nn.Linear(6, 8).double()
    with pytest.raises(
        mf.InputError,
        match=r"^shape of 'up.weight' in experts\[1\]: expected \(9, 6\) as in merged, got",
    ):
        mf.calibrate_features(**arguments)
    arguments["experts"][1] = nn.Linear(2, 2)
    with pytest.raises(
        mf.InputError, match=r"in experts\[1\]: expected one as in merged, got none"
    ):
        mf.calibrate_features(**arguments)


def test_named_experts_without_data() -> None:
    arguments = _net()
    arguments["experts"] = dict(zip(("first", "other"), arguments["experts"], strict=True))
    with pytest.raises(
        mf.InputError,
        match=r"^data of task 'other': expected samples for every expert, got none\. "
        r"The tasks with data: first, second\.$",
    ):
        mf.calibrate_features(**arguments)


@pytest.mark.parametrize("sequential", [False, True], ids=["", "sequential"])
def test_undefined_is_one_and_reported(sequential: bool) -> None:
    """The merged layer is the base's, a layer is never called, a parameter is in no linear map."""
    arguments = _net(sequential=sequential)
    base, merged = arguments["base"], arguments["merged"]
    merged.up.load_state_dict(base.up.state_dict())
    found, report = mf.calibrate_features(**arguments)
    notes = {x.name: x.note for x in report.layers if x.note}
    assert notes == {
        "up": "the merged model's features are the base's",
        "unused": "never called",
        "offset": "no linear map has it for a parameter",
    }
    for layer in report.layers:
        if layer.note:
            assert layer.coefficient is None and float(layer.applied) == 1
    for name in ("up.weight", "up.bias", "unused.weight", "offset"):
        assert torch.equal(found.get_parameter(name), merged.get_parameter(name))
    assert report.as_dict()["layers"][0]["name"] == "embed"


def test_one_task_undefined() -> None:
    """The mean is over the tasks where ξ is finite."""
    base, experts, merged = models()
    with torch.no_grad():
        merged.embed.weight[:5] = base.embed.weight[:5]
    low = {"input_ids": torch.tensor([[0, 1, 2]])}  # rows that did not move
    high = {"input_ids": torch.tensor([[6, 7, 8]])}
    data = {"first": [low], "second": [high]}
    _, report = mf.calibrate_features(base, experts, merged, data)
    layer = report.layers[0]
    assert layer.name == "embed" and not torch.isfinite(layer.by_task["first"])
    assert float(layer.coefficient) == float(layer.by_task["second"])


def test_what_is_not_linear_is_left_alone() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight**2

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), Square(), nn.LSTM(4, 4))
    experts = [moved(base, k) for k in (1, 2)]
    merged = average(experts)
    data = _both([torch.randn(5, 3)])
    found, report = mf.calibrate_features(base, experts, merged, data)
    notes = {x.name: x.note for x in report.layers}
    assert notes["0"] == ""
    assert notes["1"] == notes["2"] == "its output is not linear in its parameters"
    assert torch.equal(found[1].weight, merged[1].weight)


def test_the_model_errs_in_lockstep_and_nothing_hangs() -> None:
    """An error in one batch ends the others' threads."""
    import threading

    arguments = _net(sequential=True)
    arguments["data"]["second"] = [{"input_ids": torch.full((1, 2), 99)}]  # outside the vocabulary
    with pytest.raises(mf.InputError, match="batch 0 of task 'second'"):
        mf.calibrate_features(**arguments)
    assert not [t for t in threading.enumerate() if t.name.startswith("magic-fast-call")]


def test_batches_of_many_kinds() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.linear(x + y)

    torch.manual_seed(0)
    base = Sum()
    experts = [moved(base, 1)]
    merged = moved(base, 2)
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    results = [
        mf.calibrate_features(base, experts, merged, {"a": batches})[1].layers[0].coefficient
        for batches in ([(x, y)], [[x, y]], [{"x": x, "y": y}], {"x": x, "y": y})
    ]
    assert len({float(r) for r in results}) == 1


def test_net_is_what_the_other_file_says() -> None:
    assert isinstance(models()[0], Net) and case("llama").data

"""What ``sensitive_layers`` refuses, and in which words."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import magic_fast as mf
from features.families import case
from features.planted import planted, samples

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
        "Chain.forward() got an unexpected keyword argument 'pixel_values'. It was called with 1 "
        "named argument, pixel_values=[1, 6]. Is the data of the right modality?",
    ),
    "labelled": (
        {"data": {"a": [(torch.ones(2, 6), torch.ones(2))]}},
        "batch 0 of task 'a': expected the model's arguments, got a tuple of 2 tensors ([2, 6], "
        "[2]), which may be inputs and labels. Say what the model is called with by inputs=, a "
        "function of the batch (inputs=lambda batch: batch[0]), or make it a mapping of the "
        "model's argument names.",
    ),
    "inputs_with_evaluate": (
        {"evaluate": lambda m: 1.0, "data": None, "inputs": lambda batch: batch},
        "inputs: expected it with data, got it with evaluate. Leave it out.",
    ),
    "data_in_place_of_evaluate": (
        {"evaluate": {"a": [torch.ones(2, 6)]}, "data": None},
        "evaluate: expected a function of the model, got dict. Batches of each task go to data=.",
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

"""Each mistake gives its message, and nothing else happens."""

from __future__ import annotations

import pytest
import torch

import magic_fast as mf
from api.mistakes import CASES, Call, base, experts, merging
from magic_fast import ops
from magic_fast.errors import InputError
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe


@pytest.mark.parametrize("word", CASES)
def test_message(word: str) -> None:
    call, kind, beginning = CASES[word]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message[: len(beginning)] == beginning
    assert message.endswith(".") or message.endswith("?")


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (merging(base(), experts(), "tie"), "Did you mean 'ties'?"),
        (merging(base(), experts(), "dare_tie"), "Did you mean 'dare_ties'?"),
        (merging(base(), experts(), densty=0.5), "Did you mean 'density'?"),
        (merging(base(), experts(), normalise=True), "Did you mean 'normalize'?"),
    ],
)
def test_suggestion(call: Call, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize("place", ["base", "expert 0", "expert 1"])
def test_out_may_not_overlap_an_input(place: str) -> None:
    memory = torch.zeros(3, 4)
    inputs = {"base": torch.zeros(2, 4), "expert 0": torch.ones(2, 4), "expert 1": torch.ones(2, 4)}
    inputs[place] = memory[1:]
    with pytest.raises(InputError) as caught:
        mf.merge(
            inputs["base"], [inputs["expert 0"], inputs["expert 1"]], "average", out=memory[:2]
        )
    assert str(caught.value) == (
        f"out for the tensor: expected memory of its own, got memory that overlaps {place}. "
        "Inputs are never written to."
    )
    assert bool((memory[1:] == inputs[place]).all())


def test_calibration_out_may_not_overlap_the_merged_model() -> None:
    merged = torch.ones(2, 3)
    with pytest.raises(InputError, match="out for the tensor: expected memory of its own"):
        mf.calibrate_weights(base(), experts(), merged, out=merged)


def test_given_masks_are_needed() -> None:
    from magic_fast.recipe import Consensus, Trim, TrimRule

    job = Job(None, experts(), Recipe((1.0, 1.0), trim=Trim(TrimRule.GIVEN)), base())
    with pytest.raises(InputError, match="masks for the tensor: expected one per expert"):
        ops.merge([job])
    recipe = Recipe((1.0, 1.0), consensus=Consensus((), given=True))
    with pytest.raises(InputError, match="task masks for the tensor: expected one per expert"):
        ops.merge([Job(None, experts(), recipe, base())])


def test_a_job_needs_out() -> None:
    with pytest.raises(InputError, match="out for 'w': expected an array, got None"):
        ops.merge([Job(None, experts(), Recipe((1.0, 1.0)), name="w")])


def test_the_merge_of_one_expert_calibrated_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="magic_fast"):
        mf.merge(base(), experts(1), "average", calibrate="wsc")
    assert "calibrating the merge of one expert gives back a full-size task vector" in caplog.text

"""The model of a checkpoint, run with the weights of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from magic_fast.calibration.features.run import FeatureRun
from magic_fast.calibration.features.streamed import MERGED, AbsentError, Read, StreamedWeights
from magic_fast.checkpoint import Checkpoint
from magic_fast.errors import InputError
from magic_fast.huggingface import models as hf_models

HELD = (
    "the model uses weights outside of its layers' own calls: the merged model is held in memory "
    "whole"
)
Make = Callable[[nn.Module, StreamedWeights], FeatureRun]


def new_buffer(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def run_streamed(
    structure: nn.Module,
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
    read: Read,
    device: str,
    make: Make,
    data: Mapping[str, Any],
    warnings: list[str],
) -> FeatureRun:
    """Runs a model whose weights are read when its layers are called. One that uses weights outside
    of their layers' calls is held whole instead, with a warning.

    Args:
        structure: the model without its weights.
        checkpoint: that it is of.
        stored: name in the model → in the checkpoint.
        read: gives weights; the model's own are number 0.
        make: (model, its weights) → the run.
    """

    def attempt(model: nn.Module, *, resident: bool) -> FeatureRun:
        hf_models.move_buffers(model, device)
        run = make(model, StreamedWeights(read, device, resident=resident))
        if not resident:
            inside = {p.name for station in run.stations for s in station.sites for p in s.parts}
            rest = [n for n in stored if n not in inside]
            hf_models.materialise(
                model, {n: read(MERGED, n, new_buffer, None).to(device) for n in rest}
            )
        run.run(data)
        return run

    try:
        return attempt(structure, resident=False)
    except InputError as error:
        if not isinstance(error.__cause__, AbsentError):
            raise
    warnings.append(HELD)
    model = hf_models.build_structure(checkpoint)
    hf_models.materialise(model, {n: read(MERGED, n, new_buffer, None) for n in stored})
    return attempt(model.to(device), resident=True)

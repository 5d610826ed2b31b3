"""Buffers to tensors, steps to jobs, results to bytes: the part of the engine that uses torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from magic_fast import ops
from magic_fast.engine.execute.streamed import refuse_unequal
from magic_fast.engine.plan.directions import directions_of
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.step import FLOATS, Input, Step, over_model
from magic_fast.engine.plan.units import Unit
from magic_fast.methods.registry import find_step
from magic_fast.ops.job import Job, Stats
from magic_fast.recipe import Recipe, Selection
from magic_fast.reference import merge as reference
from magic_fast.reference.scope import select_model

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def tensor_of(source: Input, data: Any, cast: str | None = None, device: str = "cpu") -> Tensor:
    """The stored tensor over its buffer (no copy), rounded to ``cast`` where that differs."""
    dtype = DTYPES[source.info.dtype]
    if not len(data):
        return torch.empty(source.shape, dtype=DTYPES[cast or source.info.dtype], device=device)
    x = torch.frombuffer(data, dtype=dtype).view(source.shape).to(device)
    return x if cast is None else x.to(DTYPES[cast])


def as_bytes(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, little-endian; the view keeps it alive."""
    if not x.numel():
        return memoryview(b"")
    array: Any = x.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array).cast("B")


class Worker:
    """Second stage, for units that need their whole tensor: ops on torch tensors."""

    def __init__(
        self,
        plan: MergePlan,
        nonfinite: str,
        selections: Mapping[str, Selection] | None = None,
    ) -> None:
        self._plan = plan
        self._device = plan.device
        self._nonfinite = nonfinite
        self.selections: dict[str, Selection] = dict(selections or {})

    def prepare(self) -> None:
        """Thresholds over the whole model, where a trim has that scope: streamed, once per
        digit."""
        steps = sorted((s for s in self._plan.steps if over_model(s)), key=lambda s: s.name)
        if any(s.name not in self.selections for s in steps):
            recipe = steps[0].recipe
            assert recipe is not None
            found = select_model(lambda: self._source(steps), recipe)
            self.selections = {s.name: f for s, f in zip(steps, found, strict=True)}

    def _source(self, steps: Sequence[Step]) -> Iterator[tuple[Tensor | None, Sequence[Tensor]]]:
        """Base and experts of each step, read as they are asked for."""
        for step in steps:
            buffers = []
            for i in step.inputs:
                data = bytearray(i.nbytes)
                self._plan.models[i.model].read_into(i.info.name, data, 0, i.nbytes)
                buffers.append(data)
            base, experts, _ = step.split(self._tensors(step, buffers))
            yield base, experts

    def __call__(self, unit: Unit) -> None:
        """Merges the one step of a unit."""
        (loaded,) = unit.buffers["pieces"]
        unit.buffers["stats"] = [None]
        if loaded.record is not None:
            return
        step: Step = loaded.piece.step
        buffers = [view for _, _, view in loaded.inputs]
        if step.copy:
            loaded.out_bytes = self._copy(step, buffers)
            return
        out = torch.empty(step.shape, dtype=DTYPES[step.dtype], device=self._device)
        job, merged = self.job(step, self._tensors(step, buffers), out)
        stats = self.merge(step, job, merged)
        loaded.out_bytes = as_bytes(out)
        unit.buffers["stats"] = [stats]

    def job(self, step: Step, tensors: Sequence[Tensor], out: Tensor) -> tuple[Job, Tensor | None]:
        """What is to be done with the inputs of a step, and the model merged elsewhere that is to
        be calibrated, if any."""
        base, experts, merged = step.split(tensors)
        return Job(
            base,
            experts,
            step.recipe or Recipe((1.0,) * len(experts)),
            out,
            step.name,
            calibration=step.calibration,
            selection=self.selections.get(step.name),
            directions=directions_of(step),
        ), merged

    @staticmethod
    def is_plain(step: Step) -> bool:
        """Whether a step is a recipe and nothing else, so that many may share one call."""
        special = step.recipe is None or step.merged is not None or step.copy
        return not special and not step.whole

    def merge(self, step: Step, job: Job, merged: Tensor | None) -> Stats:
        """Runs a job by whatever its step asks for."""
        backend = self._plan.backend
        if merged is not None:
            return ops.calibrate(job, merged, backend=backend, nonfinite=self._nonfinite)
        if job.directions is None and (
            step.recipe is None or (step.whole and step.calibration is not None)
        ):
            return self._function(step, job)
        if step.whole:
            job.base = None
        return ops.merge([job], backend=backend, nonfinite=self._nonfinite)[0]

    def _tensors(self, step: Step, buffers: Sequence[Any]) -> list[Tensor]:
        return [
            tensor_of(i, b, step.cast, self._device)
            for i, b in zip(step.inputs, buffers, strict=True)
        ]

    def _function(self, step: Step, job: Job) -> Stats:
        def run(job: Job) -> Tensor:
            if step.recipe is not None:  # whole weights, calibrated against a base
                decisions = reference.decide(None, job.experts, step.recipe, stream=job.stream)
                return reference.combine(None, job.experts, step.recipe, decisions)
            function = find_step(step.method).function
            assert function is not None
            merged: Tensor = function(job, step.arguments, step.preset)
            return merged

        return ops.run_function([job], run, backend=self._plan.backend, nonfinite=self._nonfinite)[
            0
        ]

    def _copy(self, step: Step, buffers: Sequence[Any]) -> Any:
        """The bytes that all inputs must share; of a float tensor in the output dtype."""
        source = step.inputs[0]
        for other, data in zip(step.inputs[1:], buffers[1:], strict=True):
            same = other.info.dtype == source.info.dtype and data == buffers[0]
            refuse_unequal(step, other, same)
        if source.info.dtype in FLOATS:
            return as_bytes(tensor_of(source, buffers[0], step.cast, "cpu").to(DTYPES[step.dtype]))
        return buffers[0]

"""Buffers to tensors, steps to jobs, results to bytes: the part of the engine that uses torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from magic_fast import ops
from magic_fast.engine.plan import FLOATS, Input, MergePlan, Step
from magic_fast.engine.run import Buffers, Result, batches, check_device
from magic_fast.errors import InputError
from magic_fast.methods.functions import FUNCTIONS
from magic_fast.ops.backend import Job, Stats
from magic_fast.recipe import Recipe, Selection, TrimScope
from magic_fast.reference import merge as reference
from magic_fast.reference.scope import select_model

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def tensor_of(
    source: Input, data: bytearray, cast: str | None = None, device: str = "cpu"
) -> Tensor:
    """The stored tensor over its buffer (no copy), rounded to ``cast`` where that differs."""
    dtype = DTYPES[source.info.dtype]
    if not data:
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
    """Turns batches of steps into bytes to write."""

    def __init__(self, plan: MergePlan, device: str, nonfinite: str) -> None:
        self._plan = plan
        self._device = check_device(device)
        self._nonfinite = nonfinite
        self._selections: dict[str, Selection] = {}

    def prepare(self, read: Callable[[Sequence[Step]], Buffers]) -> None:
        """Thresholds over the whole model, where a trim has that scope: streamed, once per
        digit."""
        steps = [
            s
            for s in self._plan.steps
            if s.recipe is not None
            and s.recipe.trim.by_magnitude
            and s.recipe.trim.scope is TrimScope.MODEL
        ]
        if not steps:
            return
        steps.sort(key=lambda s: s.name)
        recipe = steps[0].recipe
        assert recipe is not None
        for step in steps:
            assert step.recipe is not None
            if step.recipe.trim != recipe.trim:
                raise InputError(
                    f"trim of '{step.name}': expected the density of '{steps[0].name}', got "
                    "another. "
                    "A threshold over the whole model needs one density for all tensors of "
                    "an expert."
                )

        def source() -> Iterator[tuple[Tensor | None, Sequence[Tensor]]]:
            for batch in batches(steps):
                buffers = read(batch)
                for step in batch:
                    base, experts, _ = self._inputs(step, buffers[step.name])
                    yield base, experts

        found = select_model(source, recipe)
        self._selections = {s.name: f for s, f in zip(steps, found, strict=True)}

    def _inputs(
        self, step: Step, buffers: Sequence[bytearray]
    ) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
        rows = [
            tensor_of(i, b, step.cast, self._device)
            for i, b in zip(step.inputs, buffers, strict=True)
        ]
        merged = rows.pop() if step.merged is not None else None
        base = rows.pop(0) if step.base is not None else None
        return base, rows, merged

    def run(self, batch: Sequence[Step], buffers: Buffers) -> list[Result]:
        """((name, bytes), statistics, backend) of each step, in order."""
        jobs: dict[str, Job] = {}
        done: dict[str, tuple[Any, Stats | None, str]] = {}
        for step in batch:
            if step.copy:
                done[step.name] = (self._copy(step, buffers[step.name]), None, "copy")
                continue
            base, experts, merged = self._inputs(step, buffers[step.name])
            out = torch.empty(step.shape, dtype=DTYPES[step.dtype], device=self._device)
            job = Job(
                base, experts, step.recipe or Recipe((1.0,) * len(experts)), out, step.name,
                calibration=step.calibration, selection=self._selections.get(step.name),
            )  # fmt: skip
            if merged is not None:
                stats = ops.calibrate(
                    job, merged, backend=self._plan.backend, nonfinite=self._nonfinite
                )
                done[step.name] = (as_bytes(out), stats, stats.backend)
            elif step.recipe is None or (step.whole and step.calibration is not None):
                stats = self._function(step, job)
                done[step.name] = (as_bytes(out), stats, stats.backend)
            else:
                if step.whole:
                    job.base = None
                jobs[step.name] = job
        found = ops.merge(
            list(jobs.values()), backend=self._plan.backend, nonfinite=self._nonfinite
        )
        for (name, job), stats in zip(jobs.items(), found, strict=True):
            assert job.out is not None
            done[name] = (as_bytes(job.out), stats, stats.backend)
        return [((s.name, done[s.name][0]), done[s.name][1], done[s.name][2]) for s in batch]

    def _function(self, step: Step, job: Job) -> Stats:
        def merged(job: Job) -> Tensor:
            if step.recipe is not None:  # whole weights, calibrated against a base
                decisions = reference.decide(None, job.experts, step.recipe, stream=job.stream)
                return reference.combine(None, job.experts, step.recipe, decisions)
            return FUNCTIONS[step.method](job, step.arguments, step.preset)

        return ops.run_function(
            [job], merged, backend=self._plan.backend, nonfinite=self._nonfinite
        )[0]

    def _copy(self, step: Step, buffers: Sequence[bytearray]) -> Any:
        """The bytes of an integer tensor, which all must share; of a float tensor the first, in
        the output dtype."""
        source = step.inputs[0]
        if source.info.dtype in FLOATS:
            return as_bytes(tensor_of(source, buffers[0], step.cast, "cpu").to(DTYPES[step.dtype]))
        for other, data in zip(step.inputs[1:], buffers[1:], strict=True):
            if other.info.dtype != source.info.dtype or data != buffers[0]:
                raise InputError(
                    f"integer tensor '{step.name}' in {other.model}: expected the values of "
                    f"{source.model}, got others. Integer tensors are not merged; they must agree."
                )
        return buffers[0]

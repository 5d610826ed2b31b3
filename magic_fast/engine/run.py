"""Runs a plan: read, merge, write, overlapping; the result appears once, whole."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from magic_fast.checkpoint import Checkpoint, OutputFolder
from magic_fast.engine.plan import MergePlan, Step
from magic_fast.engine.report import MergeReport, Progress, TensorReport
from magic_fast.errors import InputError
from magic_fast.ops.backend import Stats

Finish = Callable[[MergePlan, MergeReport, OutputFolder], None]
Buffers = dict[str, list[bytearray]]  # step name → one buffer per input

_BATCH_BYTES = 64 << 20  # small tensors are read, merged and written together
_FLOAT32_COPIES = 3  # held beside the buffers while a threshold is looked for


def batches(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Consecutive steps of about ``_BATCH_BYTES`` of input; a larger tensor is a batch of its
    own."""
    batch: list[Step] = []
    size = 0
    for step in steps:
        nbytes = sum(i.nbytes for i in step.inputs)
        if batch and size + nbytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(step)
        size += nbytes
    if batch:
        yield batch


def peak_memory(steps: Sequence[Step]) -> int:
    """Bytes of buffers at the worst moment: one batch being read, one merged, one written, and
    work space."""
    sizes = [
        (sum(i.nbytes for s in b for i in s.inputs), sum(s.spec.nbytes for s in b))
        for b in batches(steps)
    ]
    most = 0
    for n, (read, written) in enumerate(sizes):
        ahead = sizes[n + 1][0] if n + 1 < len(sizes) else 0
        behind = sizes[n - 1][1] if n else 0
        most = max(most, read + written + ahead + behind)
    work = max((4 * s.numel for s in steps), default=0)
    return most + _FLOAT32_COPIES * work


class _Reader:
    """Fills buffers from the checkpoints of a plan."""

    def __init__(self, models: dict[str, Checkpoint]) -> None:
        self._models = models

    def read(self, batch: Sequence[Step]) -> Buffers:
        found: Buffers = {}
        for step in batch:
            buffers = []
            for source in step.inputs:
                data = bytearray(source.nbytes)
                self._models[source.model].read_into(source.info.name, data, 0, source.nbytes)
                buffers.append(data)
            found[step.name] = buffers
        return found


def run(
    plan: MergePlan,
    *,
    device: str = "auto",
    nonfinite: str = "error",
    progress: Callable[[Progress], None] | None = None,
    finish: Finish | None = None,
) -> MergeReport:
    """Executes ``plan``.

    Args:
        plan: from ``plan_checkpoints`` and its kin.
        device: ``cpu``, ``cuda``, ``cuda:i`` or ``auto``.
        nonfinite: ``error`` or ``propagate``.
        progress: called after each batch.
        finish: writes the small files, before the result appears.

    Raises:
        NonFiniteError, CheckpointError, OutputError: nothing is left under the final name.
    """
    from magic_fast.engine.tensors import Worker

    started = time.monotonic()
    worker = Worker(plan, device, nonfinite)
    reader = _Reader(dict(plan.models))
    total = sum(i.nbytes for s in plan.steps for i in s.inputs) + plan.output_bytes
    report = MergeReport(plan.out, plan.method, "", warnings=list(plan.warnings))
    used: Counter[str] = Counter()
    done = 0
    with OutputFolder(plan.out) as output:
        output.create_shards(plan.shards)
        worker.prepare(reader.read)
        # one thread reads ahead, one writes behind; both block in system calls, without the GIL
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
            pending: Future[None] | None = None
            queue = list(batches(plan.steps))
            reading = ahead.submit(reader.read, queue[0])
            for n, batch in enumerate(queue):
                buffers = reading.result()
                if n + 1 < len(queue):
                    reading = ahead.submit(reader.read, queue[n + 1])
                results = worker.run(batch, buffers)
                del buffers
                if pending is not None:
                    pending.result()
                pending = behind.submit(_write, output, results)
                for step, (_, stats, backend) in zip(batch, results, strict=True):
                    report.tensors.append(_tensor_report(step, stats))
                    used[backend] += step.numel
                    report.bytes_read += sum(i.nbytes for i in step.inputs)
                    report.bytes_written += step.spec.nbytes
                done += sum(i.nbytes for s in batch for i in s.inputs)
                done += sum(s.spec.nbytes for s in batch)
                if progress is not None:
                    progress(Progress(done, total, batch[-1].name))
            if pending is not None:
                pending.result()
        del used["copy"]
        report.backend = used.most_common(1)[0][0] if used else "copy"
        if finish is not None:
            finish(plan, report, output)
        output.finalise()
    report.seconds = time.monotonic() - started
    report.peak_memory_bytes = peak_rss()
    return report


Result = tuple[tuple[str, Any], Stats | None, str]


def _write(output: OutputFolder, results: Sequence[Result]) -> None:
    for (name, data), _, _ in results:
        output.write(name, data)


def _tensor_report(step: Step, stats: Stats | None) -> TensorReport:
    found = TensorReport(step.name, step.shape)
    if stats is None or stats.coefficient is None or step.calibration is None:
        return found
    coefficient = [c for c in stats.coefficient.tolist() if math.isfinite(c)]
    found.calibrated = True
    found.rows = step.calibration.rows
    if coefficient:
        found.coefficient_mean = sum(coefficient) / len(coefficient)
        found.coefficient_min, found.coefficient_max = min(coefficient), max(coefficient)
    found.magnitude_before = stats.extra.get("magnitude_before")
    found.magnitude_after = stats.extra.get("magnitude_after")
    found.rows_repaired = int(stats.extra["repaired"].sum())
    return found


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(usage) * (1 if sys.platform == "darwin" else 1024)


def check_device(device: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:i`` of this machine for what the user asked.

    Raises:
        InputError: no such device here.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:i', got {device!r}.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device!r}: expected one of {torch.cuda.device_count()} CUDA devices of "
            "this machine. "
            "Use --device cpu, or check the driver with `magic-fast doctor`."
        )
    return device

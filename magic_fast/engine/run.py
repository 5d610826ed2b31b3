"""The frame of every run: shards are created, an executor fills them, what it did is reported, and
the result appears once, whole."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from magic_fast.checkpoint import OutputFolder
from magic_fast.checkpoint.fs import REAL
from magic_fast.checkpoint.io_errors import writing
from magic_fast.checkpoint.staging import Staging
from magic_fast.engine.execute.executor import Executor, Outcome, Work
from magic_fast.engine.execute.registry import executor_for
from magic_fast.engine.execute.writer import magnitudes
from magic_fast.engine.output.identity import Identity, identity_of, labelled
from magic_fast.engine.output.journal import Journal, NoJournal, Record
from magic_fast.engine.output.report import (
    MergeReport,
    Progress,
    TensorReport,
    Written,
    quantiles_of,
)
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.step import Step
from magic_fast.errors import NonFiniteError

Finish = Callable[[MergePlan, MergeReport, OutputFolder, Written], None]


def run(
    plan: MergePlan,
    *,
    executor: str | Executor = "auto",
    nonfinite: str = "error",
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    finish: Finish | None = None,
) -> MergeReport:
    """Runs a plan.

    Args:
        plan: from ``plan_checkpoints`` and its kin.
        executor: what runs it: a name, or the executor itself; ``auto``: this machine.
        nonfinite: ``error`` or ``propagate``.
        resume: continue what an interrupted run left, if it was this one.
        progress: called after each unit.
        finish: writes the small files, before the result appears.

    Raises:
        InputError: the executor cannot run the plan, or a tensor that must be whole needs more
            memory than is allowed; nothing is written.
        NonFiniteError, CheckpointError, OutputError: nothing is left under the final name; what was
            written can be resumed (but for NonFiniteError, which would come again).
    """
    started = time.monotonic()
    chosen = executor_for(executor, [plan])
    with OutputFolder(plan.out, resume=resume, resumable=True) as output:
        try:
            identity = identity_of(plan, nonfinite)
            journal = Journal(output, identity)  # first: it may refuse to resume
            work = Work(plan, output, journal, nonfinite, progress)
            (report,) = _execute(chosen, [(work, output, identity)], finish)
        except NonFiniteError:
            output.abort()
            raise
    _measure([report], started)
    return report


def run_sweep(
    plans: Sequence[MergePlan],
    names: Sequence[str],
    out: str,
    *,
    executor: str | Executor = "auto",
    nonfinite: str = "error",
    progress: Callable[[Progress], None] | None = None,
    finish: Finish | None = None,
    index: Callable[[Sequence[MergeReport]], str],
) -> list[MergeReport]:
    """Runs plans over the same inputs, from one read of them if the executor shares it.

    Args:
        plans: the same tensors from the same sources; each ``out`` is ``out``/name.
        names: the sub-folder of each.
        out: the folder; it appears once, whole, with all sub-folders.
        index: the text of ``sweep.json``, from the reports.

    Everything else as in :func:`run`.

    Raises:
        InputError, NonFiniteError, CheckpointError, OutputError: nothing is left.
    """
    started = time.monotonic()
    chosen = executor_for(executor, plans)
    staging = Staging(out, resume=False, fs=REAL)
    try:
        with ExitStack() as stack:
            opened = []
            for plan, name in zip(plans, names, strict=True):
                output = OutputFolder(os.path.join(staging.partial, name))
                stack.enter_context(output)
                work = Work(plan, output, NoJournal(), nonfinite, progress)
                opened.append((work, output, identity_of(plan, nonfinite)))
            reports = _execute(chosen, opened, finish)
        _measure(reports, started)
        _write_index(os.path.join(staging.partial, "sweep.json"), staging, index(reports))
        staging.commit()
    finally:
        staging.abandon(keep=False)
    return reports


def _execute(
    executor: Executor,
    opened: Sequence[tuple[Work, OutputFolder, Identity]],
    finish: Finish | None,
) -> list[MergeReport]:
    """Shards with their headers, filled by an executor, reported, and under their final names."""
    works = [work for work, *_ in opened]
    try:
        for work, output, identity in opened:
            output.create_shards(labelled(work.plan, identity))
        outcomes = executor.sweep(works) if len(works) > 1 else [executor.run(works[0])]
    finally:
        for work in works:
            work.journal.close()
    return [
        _complete(*each, outcome, finish) for each, outcome in zip(opened, outcomes, strict=True)
    ]


def _complete(
    work: Work, output: OutputFolder, identity: Identity, outcome: Outcome, finish: Finish | None
) -> MergeReport:
    """The report, the small files, and the output under its final name."""
    plan = work.plan
    report = MergeReport(plan.out, plan.method, "", warnings=list(plan.warnings))
    _report_tensors(report, plan, outcome)
    report.bytes_read, report.bytes_written = outcome.bytes_read, outcome.bytes_written
    report.stages = outcome.stages
    if finish is not None:
        # several devices or processes finish in any order
        checksums, counts = dict(sorted(outcome.checksums.items())), outcome.nonfinite
        if counts is not None:
            counts = {s.name: counts[s.name] for s in plan.steps if s.name in counts}
        finish(plan, report, output, Written(identity, checksums, counts))
    output.finalise()
    return report


def _report_tensors(report: MergeReport, plan: MergePlan, outcome: Outcome) -> None:
    """The tensors of the report, in the order of the plan."""
    used: Counter[str] = Counter()
    for step in plan.steps:
        records = outcome.records[step.name]
        for r in records:
            used[r.backend] += r.stop - r.start
        found = _tensor_report(step, records)
        if outcome.nonfinite is not None:
            found.nonfinite = outcome.nonfinite.get(step.name, 0)
        report.tensors.append(found)
    del used["copy"]
    report.backend = used.most_common(1)[0][0] if used else "copy"


def _tensor_report(step: Step, records: Sequence[Record]) -> TensorReport:
    found = TensorReport(step.name, step.shape)
    if step.calibration is None:
        return found
    values = [c for r in records for c in r.coefficient if math.isfinite(c)]
    found.calibrated = True
    found.rows = step.calibration.rows
    if values:
        found.coefficient_mean = math.fsum(values) / len(values)
        found.coefficient_min, found.coefficient_max = min(values), max(values)
        found.coefficient_quantiles = quantiles_of(values)
    found.magnitude_before, found.magnitude_after = magnitudes(records)
    found.rows_repaired = sum(r.repaired for r in records)
    return found


def _measure(reports: Sequence[MergeReport], started: float) -> None:
    """Wall time and the largest resident set of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for report in reports:
        report.seconds = time.monotonic() - started
        report.peak_memory_bytes = int(usage) * (1 if sys.platform == "darwin" else 1024)


def _write_index(path: str, staging: Staging, text: str) -> None:
    data = text.encode()
    with writing(path, staging.partial, REAL, len(data)):
        with REAL.new_file(path) as fd:
            REAL.write_exactly(fd, memoryview(data), 0)
            REAL.fsync(fd)
        REAL.fsync_path(staging.partial)

"""Runs a plan: read, merge, write, overlapping, within a bound of memory; the result appears once,
whole."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

from magic_fast.checkpoint import OutputFolder
from magic_fast.engine.execute.local import Run
from magic_fast.engine.execute.streamed import BadRecord, Writer, magnitudes
from magic_fast.engine.output.identity import Identity, identity_of, labelled
from magic_fast.engine.output.journal import Journal, Record
from magic_fast.engine.output.recheck import drop_damaged
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
    nonfinite: str = "error",
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    finish: Finish | None = None,
) -> MergeReport:
    """Executes ``plan``.

    Args:
        plan: from ``plan_checkpoints`` and its kin.
        nonfinite: ``error`` or ``propagate``.
        resume: continue what an interrupted run left, if it was this one.
        progress: called after each unit.
        finish: writes the small files, before the result appears.

    Raises:
        InputError: a tensor that must be whole needs more memory than is allowed; nothing is
            written.
        NonFiniteError, CheckpointError, OutputError: nothing is left under the final name; what was
            written can be resumed (but for NonFiniteError, which would come again).
    """
    started = time.monotonic()
    plan.budget.refuse_excess()
    report = MergeReport(plan.out, plan.method, "", warnings=list(plan.warnings))
    with OutputFolder(plan.out, resume=resume, resumable=True) as output:
        try:
            identity = identity_of(plan, nonfinite)
            journal = Journal(output, identity)  # first: it may refuse to resume
            try:
                output.create_shards(labelled(plan, identity))
                while True:
                    job = Run(plan, nonfinite, progress)
                    try:
                        writer, pipeline = job.execute(output, journal)
                        break
                    except BadRecord:  # damaged since
                        drop_damaged(output, journal, plan.steps)
            finally:
                journal.close()
            fill_report(report, plan, writer)
            report.bytes_read, report.bytes_written = job.bytes_read, writer.written
            report.stages = vars(pipeline.times)
            if finish is not None:
                finish(plan, report, output, evidence(writer, identity))
            output.finalise()
        except NonFiniteError:
            output.abort()
            raise
    report.seconds = time.monotonic() - started
    report.peak_memory_bytes = peak_rss()
    return report


def evidence(writer: Writer, identity: Identity) -> Written:
    """What the record of a finished output tells of its tensors."""
    # sorted: several devices finish in any order
    return Written(identity, dict(sorted(writer.checksums.items())), writer.nonfinite)


def fill_report(report: MergeReport, plan: MergePlan, writer: Writer) -> None:
    """The tensors of the report, in the order of the plan."""
    used: Counter[str] = Counter()
    for step in plan.steps:
        records = writer.records[step.name]
        for r in records:
            used[r.backend] += r.stop - r.start
        found = _tensor_report(step, records)
        found.nonfinite = writer.nonfinite[step.name] if writer.nonfinite is not None else 0
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


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(usage) * (1 if sys.platform == "darwin" else 1024)

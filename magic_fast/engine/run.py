"""Runs a plan: read, merge, write, overlapping, within a bound of memory; the result appears once,
whole."""

from __future__ import annotations

import math
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from magic_fast.checkpoint import OutputFolder
from magic_fast.engine.directions import needs_whole
from magic_fast.engine.identity import Identity, identity_of, labelled
from magic_fast.engine.journal import Journal, NoJournal, Record
from magic_fast.engine.memory import SLOTS, Slot
from magic_fast.engine.native import Mode, over_model
from magic_fast.engine.pipeline import Pipeline
from magic_fast.engine.plan import MergePlan, Step
from magic_fast.engine.recheck import drop_damaged
from magic_fast.engine.report import MergeReport, Progress, TensorReport, Written, quantiles_of
from magic_fast.engine.stages import BadRecord, Loader, Streamed, Writer, magnitudes
from magic_fast.engine.units import UNIT_BYTES, Piece, Unit, cut, fits, group
from magic_fast.errors import NonFiniteError
from magic_fast.recipe import Selection

if TYPE_CHECKING:
    from magic_fast.engine.device import Share
    from magic_fast.engine.tensors import Worker

Finish = Callable[[MergePlan, MergeReport, OutputFolder, Written], None]


class Run:
    """One execution of a plan.

    Args:
        plan: what to do.
        nonfinite: ``error`` or ``propagate``.
        progress: called after each unit.
        selections: of tensors for which they were found before.
    """

    def __init__(
        self,
        plan: MergePlan,
        nonfinite: str,
        progress: Callable[[Progress], None] | None,
        selections: Mapping[str, Selection] | None = None,
    ) -> None:
        self._plan = plan
        self._nonfinite = nonfinite
        self._slot_bytes = plan.budget.slot_bytes
        self._progress = progress
        self._modes = {name: mode for name, (mode, _) in plan.budget.modes.items()}
        self._bytes_read = 0
        self._done = 0
        self._telling = threading.Lock()
        self._worker: Worker | None = None
        self._given = dict(selections or {})

    def execute(self, output: OutputFolder, journal: Journal) -> tuple[Writer, Pipeline]:
        """All tensors merged and written; the output is not final yet."""
        if self._plan.device != "cpu":
            return self._execute_staged(output, journal)
        self._compute = Streamed(self._nonfinite, self._given)
        if Mode.TORCH in self._modes.values():
            from magic_fast.engine.tensors import Worker

            self._worker = Worker(self._plan, self._nonfinite, self._given)
        used = SLOTS if Mode.STREAM in self._modes.values() else 0
        slots = [Slot(self._slot_bytes) for _ in range(used)]
        writer = Writer(output, journal, self._nonfinite)
        self._total = self._expected_bytes()
        with Loader(self._plan.models, output, journal) as loader:
            pipeline = self._pipeline = Pipeline(loader, self._run, writer, slots)
            if self._worker is not None:
                self._worker.prepare()
            pipeline.run(self._units(journal))
        return writer, pipeline

    def _execute_staged(self, output: OutputFolder, journal: Journal) -> tuple[Writer, Pipeline]:
        """The same on GPUs."""
        from magic_fast.engine import device, staged

        lanes = device.lanes_of(self._plan.device)
        slots = [Slot(self._slot_bytes) for _ in range(SLOTS)]
        up, down = slots[: SLOTS // 2], slots[SLOTS // 2 :]
        self._total = self._expected_bytes()
        with (
            staged.StagedLoader(self._plan, output, journal, lanes, up) as loader,
            staged.StagedWriter(output, journal, self._nonfinite, lanes, down) as writer,
        ):
            worker = self._worker = staged.StagedWorker(
                self._plan, self._nonfinite, lanes, loader, self._given
            )
            pipeline = Pipeline(loader, self._run, writer, (), len(lanes))
            loader.check = pipeline.check
            worker.prepare()
            pipeline.run(self._staged_units(device.Share(lanes)))
        return writer, pipeline

    def _staged_units(self, share: Share) -> Iterator[Unit]:
        """Whole tensors, small ones together, each to the device that was given the least."""
        pieces = [Piece(step, 0, step.numel) for step in self._plan.steps]
        for batch in group(pieces, self._slot_bytes):
            lane = share.next(sum(p.nbytes for p in batch))
            yield Unit(batch, streamed=False, torch=True, staged=True, lane=lane)

    def search_model(self) -> dict[str, Selection]:
        """Only the selections of a trim over the whole model; nothing is merged or written."""
        self._compute = Streamed(self._nonfinite)
        self._total = self._expected_bytes()
        steps = [s for s in self._plan.steps if over_model(s)]
        if any(self._modes[s.name] is Mode.TORCH for s in steps):
            from magic_fast.engine.tensors import Worker

            worker = Worker(self._plan, self._nonfinite)
            worker.prepare()
            return {s.name: worker.selections[s.name] for s in steps}
        slots = [Slot(self._slot_bytes) for _ in range(SLOTS)]
        with Loader(self._plan.models, None, NoJournal()) as loader:
            self._pipeline = Pipeline(loader, self._run, lambda unit: None, slots)
            self._pipeline.run(self._model_scope({}))
        return {s.name: self._compute.selections[s.name] for s in steps}

    def _expected_bytes(self) -> int:
        reads = sum(i.nbytes for s in self._plan.steps for i in s.inputs)
        again = sum(self._search_bytes(s) for s in self._plan.steps if self._needs_search(s))
        return reads + self._plan.output_bytes + again

    def _search_bytes(self, step: Step) -> int:
        """What finding a step's selection reads, as a rule."""
        recipe = step.recipe
        if recipe is None:
            return sum(i.nbytes for i in step.inputs)
        by_magnitude = recipe.trim.by_magnitude and recipe.trims
        passes = sum((by_magnitude, *recipe.phases.values()))
        return passes * sum(i.nbytes for i in step.inputs)

    def _needs_search(self, step: Step) -> bool:
        recipe = step.recipe
        if recipe is None:
            small = self._modes[step.name] is not Mode.STREAM or fits(step, self._slot_bytes)
            return needs_whole(step) and not small
        if step.copy or step.merged is not None or not recipe.needs_select:
            return False
        if step.name in self._given:
            return False
        mode = self._modes[step.name]
        if over_model(step):
            return mode is not Mode.TORCH
        return mode is Mode.STREAM and not fits(step, self._slot_bytes)

    def _units(self, journal: Journal) -> Iterator[Unit]:
        """Everything to do, in the order of the plan; selections come ahead of what they serve."""
        recorded = self._recorded(journal)
        yield from self._model_scope(recorded)
        pending: list[Piece] = []
        for step in self._plan.steps:
            mode = self._modes[step.name]
            if mode is not Mode.STREAM:
                yield from self._flush(pending)
                piece = Piece(step, 0, step.numel)
                yield Unit((piece,), streamed=False, torch=mode is Mode.TORCH)
                continue
            if self._needs_search(step) and not over_model(step):
                if step.name in recorded:
                    self._done += self._search_bytes(step)
                else:
                    yield from self._flush(pending)
                    yield from self._search([step])
            pieces = recorded.get(step.name) or self.pieces(step)
            pending += pieces
            if len(pieces) > 1:
                yield from self._flush(pending)
        yield from self._flush(pending)

    def pieces(self, step: Step) -> list[Piece]:
        """Whole where a selection is found in the block itself; else no larger than need be, which
        keeps what is read in the caches until it is merged and written."""
        recipe = step.recipe
        selects = recipe is not None and step.merged is None and recipe.needs_select
        selects = selects or needs_whole(step)
        if step.copy or not selects or not fits(step, self._slot_bytes):
            small = cut(step, min(self._slot_bytes, UNIT_BYTES))
            if small:
                return small
        return cut(step, self._slot_bytes)

    def _flush(self, pending: list[Piece]) -> Iterator[Unit]:
        for pieces in group(pending, min(self._slot_bytes, UNIT_BYTES)):
            yield Unit(pieces)
        pending.clear()

    def _model_scope(self, recorded: dict[str, list[Piece]]) -> Iterator[Unit]:
        steps = [s for s in self._plan.steps if self._needs_search(s) and over_model(s)]
        if any(s.name not in recorded for s in steps):
            yield from self._search(sorted(steps, key=lambda s: s.name))
        else:
            self._done += sum(self._search_bytes(s) for s in steps)

    def _search(self, steps: Sequence[Step]) -> Iterator[Unit]:
        from magic_fast.engine.search import StreamedSearch

        search = StreamedSearch(steps, self._slot_bytes, self._pipeline.wait)
        yield from search.units()
        if steps[0].recipe is None:
            self._compute.weights |= search.weights()
        else:
            self._compute.selections |= search.selections()

    def _recorded(self, journal: Journal) -> dict[str, list[Piece]]:
        """Steps that an earlier run wrote completely, in its pieces."""
        by_name: dict[str, list[Record]] = {}
        for record in journal.records.values():
            by_name.setdefault(record.name, []).append(record)
        found = {}
        for step in self._plan.steps:
            records = sorted(by_name.get(step.name, []), key=lambda r: r.start)
            ends = [0] + [r.stop for r in records]
            if records and [r.start for r in records] == ends[:-1] and ends[-1] == step.numel:
                pieces = [Piece(step, r.start, r.stop) for r in records]
                if self._modes[step.name] is not Mode.STREAM:
                    usable = len(pieces) == 1
                else:
                    usable = all(p.nbytes <= self._slot_bytes for p in pieces)
                if usable:
                    found[step.name] = pieces
        return found

    def _run(self, unit: Unit) -> None:
        if unit.torch:
            assert self._worker is not None
            self._worker(unit)
        else:
            self._compute(unit)
        with self._telling:
            self._bytes_read += unit.buffers["bytes_read"]
            self._done = min(self._done + unit.input_bytes + unit.output_bytes, self._total)
            if self._progress is not None:
                self._progress(Progress(self._done, self._total, unit.pieces[-1].step.name))

    @property
    def bytes_read(self) -> int:
        return self._bytes_read


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

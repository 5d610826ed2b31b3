"""Runs plans in this process: read, merge, write, overlapping, within a bound of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from magic_fast.engine.execute.counts import Meter, count_unit, outcome_of, traffic
from magic_fast.engine.execute.executor import Executor, Outcome, Work
from magic_fast.engine.execute.pipeline import Pipeline
from magic_fast.engine.execute.streamed import BadRecord, Loader, Streamed
from magic_fast.engine.execute.writer import Writer
from magic_fast.engine.output.journal import Journal, NoJournal, Record
from magic_fast.engine.output.recheck import drop_damaged
from magic_fast.engine.output.report import Progress
from magic_fast.engine.plan.directions import needs_whole
from magic_fast.engine.plan.memory import SLOTS, Slot
from magic_fast.engine.plan.modes import Mode
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.step import Step, over_model
from magic_fast.engine.plan.units import UNIT_BYTES, Piece, Unit, cut, fits, group
from magic_fast.recipe import Selection

if TYPE_CHECKING:
    from magic_fast.engine.execute.whole import Worker


class Local(Executor):
    """Runs plans in this process, on the CPU."""

    def refuse(self, plans: Sequence[MergePlan]) -> None:
        for plan in plans:
            budget = plan.budget if len(plans) == 1 else plan.budget_with(staged=False)
            budget.refuse_excess()

    def run(self, work: Work) -> Outcome:
        while True:
            try:
                return self.attempt(work)
            except BadRecord:  # damaged since it was recorded
                drop_damaged(work.output, work.journal, work.plan.steps)

    def attempt(self, work: Work) -> Outcome:
        """Runs a plan.

        Raises:
            BadRecord: a piece in the journal does not hold.
        """
        plan, given = work.plan, work.selections
        return Run(plan, work.nonfinite, work.progress, given).execute(work)

    def sweep(self, works: Sequence[Work]) -> list[Outcome]:
        from magic_fast.engine.execute.sweep import Sweep

        return Sweep(works).execute()


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
        self._modes = {name: way.mode for name, way in plan.budget.modes.items()}
        self._worker: Worker | None = None
        self._given = dict(selections or {})

    def execute(self, work: Work) -> Outcome:
        """All tensors merged and written."""
        self._compute = Streamed(self._nonfinite, self._backend_of, self._given)
        if Mode.TORCH in self._modes.values():
            from magic_fast.engine.execute.whole import Worker

            self._worker = Worker(self._plan, self._nonfinite, self._given)
        used = SLOTS if Mode.STREAM in self._modes.values() else 0
        slots = [Slot(self._slot_bytes) for _ in range(used)]
        writer = Writer(work.output, work.journal, self._nonfinite)
        self._meter = self._new_meter()
        with Loader(self._plan.models, work.output, work.journal) as loader:
            pipeline = self._pipeline = Pipeline(loader, self._run, writer, slots)
            if self._worker is not None:
                self._worker.prepare()
            pipeline.run(self._units(work.journal))
        return outcome_of(writer, self._meter, pipeline)

    def search_model(self) -> dict[str, Selection]:
        """Only the selections of a trim over the whole model; nothing is merged or written."""
        self._compute = Streamed(self._nonfinite, self._backend_of)
        self._meter = self._new_meter()
        steps = [s for s in self._plan.steps if over_model(s)]
        if any(self._modes[s.name] is Mode.TORCH for s in steps):
            from magic_fast.engine.execute.whole import Worker

            worker = Worker(self._plan, self._nonfinite)
            worker.prepare()
            return {s.name: worker.selections[s.name] for s in steps}
        slots = [Slot(self._slot_bytes) for _ in range(SLOTS)]
        with Loader(self._plan.models, None, NoJournal()) as loader:
            self._pipeline = Pipeline(loader, self._run, lambda unit: None, slots)
            self._pipeline.run(self._model_scope({}))
        return {s.name: self._compute.selections[s.name] for s in steps}

    def _backend_of(self, step: Step) -> str:
        return self._plan.budget.modes[step.name].backend

    def _new_meter(self) -> Meter:
        again = sum(self._search_bytes(s) for s in self._plan.steps if self._needs_search(s))
        return Meter(traffic([self._plan]) + again, self._progress)

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
                    self._meter.skip(self._search_bytes(step))
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
            self._meter.skip(sum(self._search_bytes(s) for s in steps))

    def _search(self, steps: Sequence[Step]) -> Iterator[Unit]:
        from magic_fast.engine.execute.search import StreamedSearch

        backend = self._backend_of(steps[0])
        search = StreamedSearch([steps], self._slot_bytes, self._pipeline.wait, backend)
        yield from search.units()
        (found,) = search.results()
        if steps[0].recipe is None:
            self._compute.weights |= found
        else:
            self._compute.selections |= found

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
        count_unit(self._meter, unit)

"""One output shard as a value, which any process that sees the same files can run; and what gathers
the shards that others ran.

    head                                            a worker, anywhere
    shards = Shards(work)
    for task in shards.tasks:  ── pickle ─────────→ task.fill(shards.folder, add) → Outcome
    shards.add(record)         ←─ each piece ─────── add(record)
    shards.done(outcome)       ←─ at the end ─────── Outcome
    return shards.outcome
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from magic_fast._version import __version__
from magic_fast.checkpoint import Checkpoint, InputFile, OutputFolder, ShardFiles, ShardPlan
from magic_fast.engine.execute.counts import Meter, traffic
from magic_fast.engine.execute.executor import Executor, Outcome, Work
from magic_fast.engine.execute.local import Run
from magic_fast.engine.execute.registry import executor_for
from magic_fast.engine.output.journal import NoJournal, Record
from magic_fast.engine.output.recheck import refuse_changed_files
from magic_fast.engine.plan.devices import backend_name
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.step import Step, over_model
from magic_fast.engine.plan.units import Piece
from magic_fast.errors import InputError
from magic_fast.ops import asked_for
from magic_fast.recipe import Selection


@dataclass(frozen=True)
class ShardTask:
    """A unit of work; `tasks_of` makes them.

    Attributes:
        shard: the output file, its header and the places in it.
        steps: its tensors.
        models: reference → what opens the checkpoint.
        files: every input file as it was when the plan was made.
        method, backend, device, memory, nonfinite: as of the plan and the run.
        made_by: version of this package and backend where the plan was made; others may differ in
            the last bits.
        selections: thresholds that need the whole model, found before.
        records: pieces that an interrupted run finished, if their bytes hold.
    """

    shard: ShardPlan
    steps: tuple[Step, ...]
    models: Mapping[str, Callable[[], Checkpoint]]
    files: tuple[InputFile, ...]
    method: str
    backend: str | None
    device: str
    memory: int | None
    nonfinite: str
    made_by: tuple[str, str]
    selections: Mapping[str, Selection] = field(default_factory=dict)
    records: tuple[Record, ...] = ()

    def fill(self, folder: str, add: Callable[[Record], None] | None = None) -> Outcome:
        """Fills the shard in ``folder``, where it was created with its header.

        Args:
            folder: where the shards of the output are while they are made.
            add: called with each piece when its bytes are written.

        Raises:
            CheckpointError: an input is not as it was when the plan was made.
            InputError: another version or backend here, or not enough memory for a tensor that must
                be whole.
            NonFiniteError, OutputError: as of a merge; what was written stays.
        """
        with self._opened() as (plan, executor):
            output = ShardFiles(os.path.join(folder, self.shard.file), folder)
            output.open_begun(plan.shards)
            try:
                return executor.run(self._work(plan, output, NoJournal(self.records, add)))
            finally:
                output.close()

    def run(self, folder: str) -> list[Record]:
        """Makes the shard in ``folder``, where it appears once, whole; tasks may share the folder.
        For processes that do not see the folder of the output. Returns its pieces.

        Raises:
            As `fill`; nothing is left.
        """
        with (
            self._opened() as (plan, executor),
            OutputFolder(os.path.join(folder, self.shard.file)) as output,
        ):
            output.create_shards(plan.shards)
            outcome = executor.run(self._work(plan, output, NoJournal()))
            output.finalise()
        return [record for step in self.steps for record in outcome.records[step.name]]

    @contextmanager
    def _opened(self) -> Iterator[tuple[MergePlan, Executor]]:
        """The shard's part of the plan, its checkpoints open, and what runs it here."""
        here = _made_by(self.backend, self.device)
        if here != self.made_by:
            raise InputError(
                f"shard {self.shard.file!r}: expected magic_fast {self.made_by[0]} with backend "
                f"{self.made_by[1]}, as where the plan was made, got {here[0]} with {here[1]}. "
                "Install the same here."
            )
        refuse_changed_files(self.files)
        models = {reference: opener() for reference, opener in self.models.items()}
        try:
            plan = MergePlan(
                self.method, self.steps, [self.shard], models, "", self.shard.file,
                backend=self.backend, memory=self.memory, device=self.device,
            )  # fmt: skip
            yield plan, executor_for("auto", [plan])
        finally:
            for model in models.values():
                model.close()

    def _work(self, plan: MergePlan, output: ShardFiles, journal: NoJournal) -> Work:
        return Work(plan, output, journal, self.nonfinite, selections=self.selections)


def _made_by(backend: str | None, device: str) -> tuple[str, str]:
    return __version__, backend_name(backend, device)


def tasks_of(
    plan: MergePlan,
    nonfinite: str = "error",
    *,
    shards: Iterable[ShardPlan] | None = None,
    records: Iterable[Record] = (),
) -> list[ShardTask]:
    """A plan as one task per output shard, each of which any process can run. Thresholds over the
    whole model, where there are any, are found here, in one read.

    Args:
        plan: from ``plan_checkpoints`` and its kin.
        nonfinite: ``error`` or ``propagate``.
        shards: those of the output, where they differ from the plan's by a label in the header.
        records: pieces that an interrupted run finished.
    """
    known: dict[str, Selection] = {}
    if any(over_model(step) for step in plan.steps):
        known = Run(plan, nonfinite, None).search_model()
    backend = asked_for(plan.backend)  # what this process's environment says holds for workers
    steps = {step.name: step for step in plan.steps}
    pieces: dict[str, list[Record]] = {}
    for record in records:
        pieces.setdefault(record.name, []).append(record)
    tasks = []
    for shard in plan.shards if shards is None else shards:
        own = tuple(steps[info.name] for info in shard.tensors)
        used = {i.model for step in own for i in step.inputs}
        models = {r: m for r, m in plan.models.items() if r in used}
        tasks.append(
            ShardTask(
                shard,
                own,
                {r: m.opener() for r, m in models.items()},
                tuple(f for m in models.values() for f in m.files),
                plan.method,
                backend,
                plan.device,
                plan.memory,
                nonfinite,
                _made_by(backend, plan.device),
                {s.name: known[s.name] for s in own if s.name in known},
                tuple(r for s in own for r in pieces.get(s.name, ())),
            )
        )
    return tasks


class Shards:
    """A run that others do, shard by shard. Its methods may be called from any thread.

    Attributes:
        tasks: what is to be run; each may be pickled, run anywhere, and run again if it failed.
        folder: where the shards are filled.
        outcome: what all of it came to, once every task is done.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._steps = {step.name: step for step in work.plan.steps}
        self._meter = Meter(traffic([work.plan]), work.progress)
        self._lock = threading.Lock()
        self._counted: set[tuple[str, int, int]] = set()
        self.folder = work.output.partial
        self.tasks = tasks_of(
            work.plan,
            work.nonfinite,
            shards=work.output.shards,
            records=work.journal.records.values(),
        )
        self.outcome = Outcome(nonfinite={} if work.nonfinite == "propagate" else None)

    def add(self, record: Record) -> None:
        """Writes a finished piece in the journal, so that an interrupted run keeps it."""
        with self._lock:
            self._work.journal.add(record)
            self._count(record)

    def done(self, outcome: Outcome) -> None:
        """Takes in what a task came to."""
        with self._lock:
            for record in (r for records in outcome.records.values() for r in records):
                piece = self._count(record)
                start, nbytes = piece.byte_range(piece.step.dtype)
                self._work.output.mark_written(record.name, start, nbytes)
            self.outcome.add(outcome)

    def _count(self, record: Record) -> Piece:
        """The piece of a record, counted once."""
        piece = Piece(self._steps[record.name], record.start, record.stop)
        if (key := (record.name, record.start, record.stop)) not in self._counted:
            self._counted.add(key)
            nbytes = piece.byte_range(piece.step.dtype)[1]
            read = sum(piece.input_bytes(i) for i in piece.step.inputs)
            self._meter.count(nbytes + read, record.name)
        return piece

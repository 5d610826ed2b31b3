"""One output shard as a value: what it is made of, how, and where it goes. Any process that sees
the same files can run it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from magic_fast.checkpoint import Checkpoint, InputFile, OutputFolder, ShardPlan
from magic_fast.engine.execute.local import Run
from magic_fast.engine.output.journal import NoJournal, Record
from magic_fast.engine.output.recheck import refuse_changed_files
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.step import Step, over_model
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
        selections: thresholds that need the whole model, found before.
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
    selections: Mapping[str, Selection] = field(default_factory=dict)

    def run(self, folder: str) -> list[Record]:
        """Makes the shard in ``folder``, where it appears once, whole; tasks may share the folder.
        Returns what a journal keeps of it.

        Raises:
            CheckpointError: an input is not as it was when the plan was made.
            NonFiniteError, OutputError: as of a merge; nothing is left.
        """
        out = os.path.join(folder, self.shard.file)
        refuse_changed_files(self.files)
        models = {reference: opener() for reference, opener in self.models.items()}
        try:
            plan = MergePlan(
                self.method, self.steps, [self.shard], models, "", out,
                backend=self.backend, memory=self.memory, device=self.device,
            )  # fmt: skip
            plan.budget.refuse_excess()
            with OutputFolder(out) as output:
                output.create_shards(plan.shards)
                job = Run(plan, self.nonfinite, None, selections=self.selections)
                writer, _ = job.execute(output, NoJournal())
                output.finalise()
        finally:
            for model in models.values():
                model.close()
        return [record for step in self.steps for record in writer.records[step.name]]


def tasks_of(plan: MergePlan, nonfinite: str = "error") -> list[ShardTask]:
    """A plan as one task per output shard, each of which any process can run. Thresholds over the
    whole model, where there are any, are found here, in one read.

    Args:
        plan: from ``plan_checkpoints`` and its kin.
        nonfinite: ``error`` or ``propagate``.
    """
    known: dict[str, Selection] = {}
    if any(over_model(step) for step in plan.steps):
        known = Run(plan, nonfinite, None).search_model()
    steps = {step.name: step for step in plan.steps}
    tasks = []
    for shard in plan.shards:
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
                plan.backend,
                plan.device,
                plan.memory,
                nonfinite,
                {s.name: known[s.name] for s in own if s.name in known},
            )
        )
    return tasks

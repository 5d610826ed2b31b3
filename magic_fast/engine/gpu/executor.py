"""Runs a plan on the GPUs of this machine."""

from __future__ import annotations

from collections.abc import Iterator

from magic_fast.engine.execute.counts import Meter, count_unit, outcome_of, traffic
from magic_fast.engine.execute.executor import Outcome, Work
from magic_fast.engine.execute.local import Local
from magic_fast.engine.execute.pipeline import Pipeline
from magic_fast.engine.gpu import lanes as device
from magic_fast.engine.gpu import staged
from magic_fast.engine.plan.memory import SLOTS, Slot
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.units import Piece, Unit, group


class Gpu(Local):
    """Whole tensors go up, are merged where they lie, and come down. A sweep runs as on the CPU,
    each tensor merged on the device."""

    def attempt(self, work: Work) -> Outcome:
        plan = work.plan
        lanes = device.lanes_of(plan.device)
        slots = [Slot(plan.budget.slot_bytes) for _ in range(SLOTS)]
        up, down = slots[: SLOTS // 2], slots[SLOTS // 2 :]
        meter = Meter(traffic([plan]), work.progress)
        output, journal, nonfinite = work.output, work.journal, work.nonfinite
        with (
            staged.StagedLoader(plan, output, journal, lanes, up) as loader,
            staged.StagedWriter(output, journal, nonfinite, lanes, down) as writer,
        ):
            worker = staged.StagedWorker(plan, nonfinite, lanes, loader, work.selections)

            def merge(unit: Unit) -> None:
                worker(unit)
                count_unit(meter, unit)

            pipeline = Pipeline(loader, merge, writer, (), len(lanes))
            loader.check = pipeline.check
            worker.prepare()
            pipeline.run(_units(plan, device.Share(lanes)))
        return outcome_of(writer, meter, pipeline)


def _units(plan: MergePlan, share: device.Share) -> Iterator[Unit]:
    """Whole tensors, small ones together, each to the device that was given the least."""
    pieces = [Piece(step, 0, step.numel) for step in plan.steps]
    for batch in group(pieces, plan.budget.slot_bytes):
        lane = share.next(sum(p.nbytes for p in batch))
        yield Unit(batch, streamed=False, torch=True, staged=True, lane=lane)

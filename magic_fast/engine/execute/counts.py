"""What running a plan counts: bytes on the way, and at the end what was written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from magic_fast.engine.execute.executor import Outcome
from magic_fast.engine.execute.pipeline import Pipeline
from magic_fast.engine.execute.writer import Writer
from magic_fast.engine.output.report import Progress
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.units import Unit


class Meter:
    """Counts the bytes of a run, from any thread, and tells the user's progress call."""

    def __init__(self, total: int, progress: Callable[[Progress], None] | None) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = threading.Lock()
        self.bytes_read = 0

    def skip(self, nbytes: int) -> None:
        """Bytes of the total that need no reading or writing after all."""
        self._done += nbytes

    def count(self, nbytes: int, tensor: str, *, read: int = 0) -> None:
        """Bytes of the total that are done, ``tensor`` last; ``read`` bytes were read for them."""
        with self._lock:
            self.bytes_read += read
            self._done = min(self._done + nbytes, self._total)
            if self._progress is not None:
                self._progress(Progress(self._done, self._total, tensor))


def traffic(plans: Sequence[MergePlan]) -> int:
    """Bytes that are read and written where plans over the same inputs read every input once."""
    reads = sum(i.nbytes for step in plans[0].steps for i in step.inputs)
    return reads + sum(plan.output_bytes for plan in plans)


def count_unit(meter: Meter, unit: Unit) -> None:
    """Counts a unit that is merged."""
    nbytes, tensor = unit.input_bytes + unit.output_bytes, unit.pieces[-1].step.name
    meter.count(nbytes, tensor, read=unit.buffers["bytes_read"])


def outcome_of(writer: Writer, meter: Meter, pipeline: Pipeline) -> Outcome:
    """What a writer wrote."""
    return Outcome(
        writer.records,
        writer.checksums,
        None if writer.nonfinite is None else dict(writer.nonfinite),
        meter.bytes_read,
        writer.written,
        dict(vars(pipeline.times)),
    )

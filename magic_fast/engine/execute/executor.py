"""What runs a plan: the protocol of an executor, what it is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from magic_fast.checkpoint import ShardFiles
from magic_fast.engine.output.journal import Journal, Record
from magic_fast.engine.output.report import Progress
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.recipe import Selection


@dataclass(frozen=True, eq=False)
class Work:
    """One plan to run.

    Attributes:
        plan: what to read, what to do, and where each tensor lies in the output.
        output: the output's shards, created with their headers; an executor fills them, and small
            files are no concern of its.
        journal: what an interrupted run finished, and where every finished piece goes. It can hold
            the pieces of any executor.
        nonfinite: ``error`` or ``propagate``.
        progress: called with :class:`Progress` now and then, or None.
        selections: thresholds of tensors for which they were found before.
    """

    plan: MergePlan
    output: ShardFiles
    journal: Journal
    nonfinite: str = "error"
    progress: Callable[[Progress], None] | None = None
    selections: Mapping[str, Selection] = field(default_factory=dict)


@dataclass(eq=False)
class Outcome:
    """What running a plan, or some of its shards, came to. It can be pickled.

    Attributes:
        records: tensor → its pieces in order, those of an earlier run that hold included.
        checksums: tensor → XXH3-64 of all its bytes, hexadecimal.
        nonfinite: tensor → values that are NaN or infinite; None where they are an error.
        bytes_read, bytes_written: of tensors, now.
        stages: seconds that ``read``, ``compute`` and ``write`` were busy.
    """

    records: dict[str, list[Record]] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    nonfinite: dict[str, int] | None = None
    bytes_read: int = 0
    bytes_written: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        """Takes in what other shards came to."""
        self.records |= other.records
        self.checksums |= other.checksums
        if other.nonfinite is not None:
            self.nonfinite = (self.nonfinite or {}) | other.nonfinite
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written
        for stage, seconds in other.stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds


class Executor(Protocol):
    """Runs plans: where and with what is its own affair, the bytes of the output are not.

    A subclass writes ``run``; an object of another kind has all three methods.
    """

    def refuse(self, plans: Sequence[MergePlan]) -> None:
        """Called before anything is written: one plan of a merge, or the several of a sweep.

        Raises:
            InputError: the executor cannot run them; the message gives the reason.
        """
        for plan in plans:
            plan.budget.refuse_excess()

    def run(self, work: Work) -> Outcome:
        """Fills the shards of ``work.output``.

        Every byte of every tensor is written, or counted as written where somebody else wrote it
        (``output.mark_written``), and each finished piece is added to ``work.journal`` after its
        bytes. A record that is in the journal already is used only if the bytes in the output
        have its checksum.

        Raises:
            MagicFastError: what a merge raises; pieces in the journal stay for ``resume``.
        """
        ...

    def sweep(self, works: Sequence[Work]) -> list[Outcome]:
        """Runs several plans over the same inputs; one after the other, unless an executor can
        share a read."""
        return [self.run(work) for work in works]

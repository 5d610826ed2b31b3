"""Several calls of one model side by side, each with its own batch, all at the same layer.

Each call is a thread that runs the model's own forward and waits wherever a station is called, so
any architecture's glue (masks, position biases, two towers) is its own code. Only one runs at a
time. So a layer's weights are needed once for all batches, and a layer can be settled from all
batches before any of them goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """What the model is called with once.

    Attributes:
        number: of the batch of the task.
        begins: how many batches begin in it: a later part, cut off its padding, begins none.
    """

    task: str
    number: int
    begins: int
    values: Any


class _Abandoned(BaseException):
    """Ends a call that nobody waits for any more; no handler of a model catches it."""


class _Runner(threading.Thread, Generic[T]):
    def __init__(self, number: int, job: Callable[[], object], paused: threading.Semaphore) -> None:
        super().__init__(name=f"magic-fast-call-{number}", daemon=True)
        self._job, self._paused = job, paused
        self.go = threading.Semaphore(0)
        self.waiting_at: T | None = None
        self.error: BaseException | None = None
        self.abandoned = False

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.abandoned:
                with torch.no_grad():
                    self._job()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.waiting_at = None
            self._paused.release()

    def wait(self, place: T) -> None:
        self.waiting_at = place
        self._paused.release()
        self.go.acquire()
        if self.abandoned:
            raise _Abandoned


class Lockstep(Generic[T]):
    """Runs ``jobs`` together; each calls ``arrive(place)`` where it has to wait.

    ``settle(arrived)`` gets (job's number, place) of all jobs that wait at one place before they go
    on; places are one where ``same(place)`` is equal.
    """

    def __init__(self, jobs: Sequence[Callable[[], object]]) -> None:
        self._paused = threading.Semaphore(0)
        self._runners: list[_Runner[T]] = [
            _Runner(n, job, self._paused) for n, job in enumerate(jobs)
        ]

    def arrive(self, place: T) -> None:
        """Called by a job: waits until every job of the place is settled."""
        runner = threading.current_thread()
        assert isinstance(runner, _Runner)
        runner.wait(place)

    def run(
        self,
        same: Callable[[T], object],
        settle: Callable[[list[tuple[int, T]]], None],
        leave: Callable[[], None],
    ) -> None:
        """Until all jobs are done. ``leave()`` after those settled have gone on.

        Raises:
            The first error of a job.
        """
        for runner in self._runners:
            runner.start()
        try:
            for number in range(len(self._runners)):
                self._resume(number)
            while waiting := self._by_place(same):
                # where control flow differs between batches, the place of the most goes first
                numbers = max(waiting.values(), key=len)
                settle([(n, self._place(n)) for n in numbers])
                for number in numbers:
                    self._resume(number)
                leave()
        finally:
            for runner in self._runners:
                if runner.is_alive():
                    runner.abandoned = True
                    runner.go.release()
            for runner in self._runners:
                runner.join()

    def _place(self, number: int) -> T:
        place = self._runners[number].waiting_at
        assert place is not None
        return place

    def _by_place(self, same: Callable[[T], object]) -> dict[object, list[int]]:
        found: dict[object, list[int]] = {}
        for number, runner in enumerate(self._runners):
            if runner.waiting_at is not None:
                found.setdefault(same(runner.waiting_at), []).append(number)
        return found

    def _resume(self, number: int) -> None:
        runner = self._runners[number]
        runner.waiting_at = None
        runner.go.release()
        self._paused.acquire()
        if runner.error is not None:
            raise runner.error


MOST_TOGETHER = 64  # calls of a model side by side, each a thread


def joined(batches: list[Batch], most: int) -> list[Batch]:
    """The batches, those of one task and of equal shapes together where there would be more than
    ``most``: no more together than that needs."""
    together = 1
    found = batches
    while len(found) > most and together < len(batches):
        together *= 2
        fewer = list(_joined(batches, together))
        if together > 2 and len(fewer) == len(found):  # no more of equal shapes
            break
        found = fewer
    return found


def _joined(batches: list[Batch], together: int) -> Iterator[Batch]:
    alike: dict[object, list[Batch]] = {}
    for number, batch in enumerate(batches):
        alike.setdefault((batch.task, _signature(batch.values) or number), []).append(batch)
    for own in alike.values():
        for start in range(0, len(own), together):
            some = own[start : start + together]
            values = some[0].values if len(some) == 1 else _stacked([b.values for b in some])
            yield replace(some[0], begins=sum(b.begins for b in some), values=values)


def _signature(values: Any) -> object:
    """What batches that may be joined share: all but the number of samples. None: it may not."""
    own = values.values() if isinstance(values, Mapping) else values
    tensors = [own] if isinstance(own, Tensor) else list(own)
    if not all(isinstance(x, Tensor) and x.dim() for x in tensors):
        return None
    if len({len(x) for x in tensors}) != 1:
        return None
    names = tuple(values) if isinstance(values, Mapping) else type(values)
    return names, tuple((tuple(x.shape[1:]), x.dtype) for x in tensors)


def _stacked(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {k: torch.cat([v[k] for v in values]) for k in first}
    if isinstance(first, Tensor):
        return torch.cat(values)
    return type(first)(torch.cat(rows) for rows in zip(*values, strict=True))

"""Reading, computing and writing at the same time, over a few blocks of memory that go round."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from magic_fast.engine.plan.memory import Slot
from magic_fast.engine.plan.units import Unit

_T = TypeVar("_T")
_POLL_SECONDS = 0.1  # how soon a waiting thread notices that another has failed
_WHOLE_TENSORS = 2  # units with memory of their own that may be in flight


@dataclass
class StageTimes:
    """Seconds that each stage was busy; they overlap."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0


class Stopped(Exception):
    """Another thread failed, or the user interrupted: leave quietly."""


class Pipeline:
    """One thread reads, the caller computes, one thread writes.

    Args:
        load: fills a unit's arrays, in a slot (None: in memory of its own).
        compute: merges a unit.
        store: writes a unit's results.
        slots: blocks of memory; each holds one unit at a time.
        lanes: how many units are merged at the same time, each lane in a thread of its own (the
            first in the caller's); ``unit.lane`` says which one takes a unit.
    """

    def __init__(
        self,
        load: Callable[[Unit, Slot | None], None],
        compute: Callable[[Unit], None],
        store: Callable[[Unit], None],
        slots: Iterable[Slot],
        lanes: int = 1,
    ) -> None:
        self._load, self._compute, self._store = load, compute, store
        self._free: queue.Queue[Slot] = queue.Queue()
        for slot in slots:
            self._free.put(slot)
        self._whole = threading.Semaphore(_WHOLE_TENSORS)
        self._ready: list[queue.Queue[Unit | None]] = [queue.Queue() for _ in range(lanes)]
        self._done: queue.Queue[Unit | None] = queue.Queue()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._clock = threading.Lock()
        self.times = StageTimes()

    def run(self, units: Iterable[Unit]) -> None:
        """Takes every unit through the three stages, in order.

        Raises:
            Whatever a stage raised first; no thread is left running.
        """
        threads = [
            threading.Thread(target=self._guard, args=(self._read, units), name="magic-fast-read"),
            threading.Thread(target=self._guard, args=(self._write,), name="magic-fast-write"),
            *(
                threading.Thread(target=self._guard, args=(self._merge, n), name=f"magic-fast-{n}")
                for n in range(1, len(self._ready))
            ),
        ]
        try:
            for thread in threads:
                thread.start()
            self._merge(0)
            for thread in threads:
                thread.join()
        except Stopped:
            pass
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            try:
                raise failure
            finally:
                del failure  # no cycle keeps the blocks of memory

    def wait(self, event: threading.Event) -> None:
        """For sources of units: waits for something that the compute stage finds out."""
        while not event.wait(_POLL_SECONDS):
            self.check()

    def check(self) -> None:
        """For stages that wait themselves.

        Raises:
            Stopped: another thread has failed.
        """
        if self._stop.is_set():
            raise Stopped

    def _merge(self, lane: int) -> None:
        while (unit := self._take(self._ready[lane])) is not None:
            with self._timed("compute"):
                self._compute(unit)
            if unit.search is not None:
                self._give_back(unit)
            else:
                self._done.put(unit)
        self._done.put(None)

    def _read(self, units: Iterable[Unit]) -> None:
        for unit in units:
            slot = None
            if unit.streamed:
                slot = self._take(self._free)
                slot.reset()
                unit.buffers["slot"] = slot
            elif not unit.staged:
                while not self._whole.acquire(timeout=_POLL_SECONDS):
                    self.check()
            with self._timed("read"):
                self._load(unit, slot)
            self.check()
            self._ready[unit.lane].put(unit)
        for lane in self._ready:
            lane.put(None)

    def _write(self) -> None:
        lanes = len(self._ready)
        while lanes:
            unit = self._take(self._done)
            if unit is None:
                lanes -= 1
                continue
            with self._timed("write"):
                self._store(unit)
            self._give_back(unit)

    def _give_back(self, unit: Unit) -> None:
        slot, release = unit.buffers.get("slot"), unit.buffers.get("release")
        unit.buffers.clear()
        if slot is not None:
            self._free.put(slot)
        elif release is not None:
            release()
        else:
            self._whole.release()

    def _take(self, source: queue.Queue[_T]) -> _T:
        while True:
            try:
                return source.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                self.check()

    def _guard(self, stage: Callable[..., None], *arguments: object) -> None:
        try:
            stage(*arguments)
        except Stopped:
            pass
        except BaseException as error:
            if self._failure is None:
                self._failure = error
            self._stop.set()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            busy = time.monotonic() - started
            with self._clock:
                setattr(self.times, stage, getattr(self.times, stage) + busy)

"""A device without a GPU: its memory is the host's, its queues are threads that are late.

Every copy waits a little before it is done, so whoever does not wait for its mark reads what was
there before: 0xCD in fresh memory. A block of the host that changes before its copy was done gives
the device the wrong bytes, as on a GPU.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

LATE = 0.002  # seconds


class FakeLane:
    """One queue per direction; ``merging`` is the queue of the caller."""

    pinned: ClassVar[set[int]] = set()  # for all devices, wherever it was asked for

    def __init__(self, name: str = "cuda:0", free: int = 1 << 40, late: float = LATE) -> None:
        self.name, self._free, self._late = name, free, late
        self._up, self._down = self._queue(), self._queue()
        self.uploaded = 0
        self.threads: set[str] = set()

    def _queue(self) -> queue.Queue[Callable[[], None]]:
        work: queue.Queue[Callable[[], None]] = queue.Queue()

        def serve() -> None:
            while True:
                work.get()()

        threading.Thread(target=serve, daemon=True).start()
        return work

    def pin(self, block: Tensor) -> None:
        self.pinned.add(block.data_ptr())

    def unpin(self, block: Tensor) -> None:
        self.pinned.remove(block.data_ptr())

    def empty(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xCD, dtype=torch.uint8)

    def free_bytes(self) -> int:
        return self._free

    def upload(self, target: Tensor, source: Tensor) -> Any:
        assert not source.numel() or source.data_ptr() in self.pinned
        self.uploaded += source.numel()
        return self._copy(self._up, target, source, None)

    def download(self, target: Tensor, source: Tensor, after: Any) -> Any:
        assert target.data_ptr() in self.pinned
        return self._copy(self._down, target, source, after)

    def _copy(
        self,
        work: queue.Queue[Callable[[], None]],
        target: Tensor,
        source: Tensor,
        after: threading.Event | None,
    ) -> threading.Event:
        done = threading.Event()

        def copy() -> None:
            if after is not None:
                after.wait()
            time.sleep(self._late)
            target.copy_(source)
            done.set()

        work.put(copy)
        return done

    @contextmanager
    def merging(self, after: Any) -> Iterator[Callable[[], threading.Event]]:
        self.threads.add(threading.current_thread().name)
        after.wait()  # a GPU's stream takes no None either

        def mark() -> threading.Event:
            done = threading.Event()
            done.set()
            return done

        yield mark

    def wait(self, mark: Any) -> None:
        assert mark.wait(60)

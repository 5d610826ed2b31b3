"""GPUs as the engine sees them: memory, and three queues of work that wait for one another.

What is read goes up in one queue, is merged in a second and comes down in a third, so that all
three and the disk work at the same time. Nothing here waits for a queue that the caller did not ask
for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger("magic_fast")

Mark = Any  # a place in a queue: everything queued before it


class Lane(Protocol):
    """One device. Memory of the host is uint8 tensors on the CPU, memory of the device uint8
    tensors on it."""

    name: str

    def pin(self, block: Tensor) -> None:
        """Locks the pages of a block of the host, so that copies from and to it do not wait."""

    def unpin(self, block: Tensor) -> None:
        """Unlocks them."""

    def empty(self, nbytes: int) -> Tensor:
        """Memory of the device."""

    def free_bytes(self) -> int:
        """What can still be taken of it."""

    def upload(self, target: Tensor, source: Tensor) -> Mark:
        """Queues a copy from the host; ``source`` may change once the mark has passed."""

    def download(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Queues a copy to the host, behind ``after``."""

    def merging(self, after: Mark) -> Any:
        """As a context: what is called in it is queued behind ``after``; gives a function that
        marks the end of what was queued so far."""

    def wait(self, mark: Mark) -> None:
        """Until everything before a mark is done."""


class CudaLane:
    """A CUDA device, with a stream for each direction and one for the kernels."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._device = torch.device(self.name)
        stream: Any = torch.cuda.Stream
        self._up, self._run, self._down = (stream(self._device) for _ in range(3))
        self._runtime: Any = torch.cuda.cudart  # torch says nothing of its types
        self._pinned: set[int] = set()

    def pin(self, block: Tensor) -> None:
        with torch.cuda.device(self._device):  # page-locking wants a context
            status = int(self._runtime().cudaHostRegister(block.data_ptr(), block.numel(), 1))
        if status == 0:
            self._pinned.add(block.data_ptr())
        else:
            log.info("memory could not be page-locked (CUDA error %d): copies wait", status)

    def unpin(self, block: Tensor) -> None:
        if block.data_ptr() in self._pinned:
            self._runtime().cudaHostUnregister(block.data_ptr())
            self._pinned.discard(block.data_ptr())

    def empty(self, nbytes: int) -> Tensor:
        # By the stream that writes first. It is given back when the host has seen the result come
        # down, so nothing of it is under way in another stream then.
        with torch.cuda.stream(self._up):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def upload(self, target: Tensor, source: Tensor) -> Mark:
        with torch.cuda.stream(self._up):
            target.copy_(source, non_blocking=True)
            return self._up.record_event()

    def download(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        self._down.wait_event(after)
        with torch.cuda.stream(self._down):
            target.copy_(source, non_blocking=True)
            return self._down.record_event()

    @contextmanager
    def merging(self, after: Mark) -> Iterator[Any]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._run):
            self._run.wait_event(after)
            yield self._run.record_event

    def wait(self, mark: Mark) -> None:
        mark.synchronize()


def lanes_of(device: str) -> list[Lane]:
    """The lanes of ``cuda:i``, or for ``cuda`` one of each GPU of the kind of the first: another
    kind may add in another order, and a result may not depend on who took which tensor."""
    if ":" in device:
        return [CudaLane(int(device.partition(":")[2]))]
    kinds = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    used = [n for n, kind in enumerate(kinds) if kind == kinds[0]]
    if len(used) < len(kinds):
        log.info("device 'cuda': %d of %d GPUs are of the first one's kind", len(used), len(kinds))
    return [CudaLane(n) for n in used]


class Share:
    """Which lane takes the next unit: the one that was given the fewest bytes."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._given = [0] * len(lanes)

    def next(self, nbytes: int) -> int:
        lane = self._given.index(min(self._given))
        self._given[lane] += nbytes
        return lane

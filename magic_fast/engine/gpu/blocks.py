"""What a run on GPUs shares out: blocks of page-locked memory, and the memory of the devices."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from magic_fast.checkpoint import ShardFiles
from magic_fast.engine.gpu.arena import arena_of
from magic_fast.engine.gpu.lanes import Lane, Mark
from magic_fast.engine.plan.memory import Slot
from magic_fast.engine.plan.modes import working_bytes
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.step import Step
from magic_fast.engine.plan.units import Piece
from magic_fast.errors import InputError

_MIB = 1 << 20
_POLL_SECONDS = 0.05
_SHARE = 0.8  # of what a device has free; the rest is for what libraries take themselves
_WORKSPACE = 64 * _MIB  # of a fused backend


class Blocks:
    """Page-locked blocks of one direction; each is used again when its copy is done."""

    def __init__(self, slots: Sequence[Slot], lane: Lane) -> None:
        self._lane = lane
        self._free = deque(
            torch.frombuffer(slot.take(slot.size)[1], dtype=torch.uint8) for slot in slots
        )
        self._busy: deque[tuple[Tensor, Lane, Mark]] = deque()
        self.size = min(block.numel() for block in self._free)
        self._all = tuple(self._free)
        for block in self._all:
            lane.pin(block)

    def take(self) -> Tensor:
        """The next block, when it is free."""
        if not self._free:
            block, lane, mark = self._busy.popleft()
            lane.wait(mark)
            return block
        return self._free.popleft()

    def queued(self, block: Tensor, lane: Lane, mark: Mark) -> None:
        """A copy of ``block`` is under way until ``mark``."""
        self._busy.append((block, lane, mark))

    def give_back(self, block: Tensor) -> None:
        self._free.append(block)

    def close(self) -> None:
        while self._busy:
            block, lane, mark = self._busy.popleft()
            lane.wait(mark)
            self._free.append(block)
        for block in self._all:
            self._lane.unpin(block)


class Room:
    """Bytes of each device that are in use; a unit waits until it fits, or is alone."""

    def __init__(self, plan: MergePlan, lanes: Sequence[Lane]) -> None:
        self._backend = plan.backend
        self._most = [int(lane.free_bytes() * _SHARE) for lane in lanes]
        self._used = [0] * len(lanes)
        self._changed = threading.Condition()
        largest = max(plan.steps, key=lambda s: self.needed([s]), default=None)
        if largest is not None and self.needed([largest]) > min(self._most):
            device = lanes[self._most.index(min(self._most))].name
            raise InputError(
                f"not enough memory on {device} for tensor '{largest.name}': expected at most "
                f"{min(self._most) // _MIB} MiB of what is free there, got "
                f"{-(-self.needed([largest]) // _MIB)} MiB. Pass --device cpu."
            )

    def needed(self, steps: Sequence[Step]) -> int:
        """Bytes of a device while these are merged: inputs, outputs, and what is computed with:
        what PyTorch takes where no fused backend runs it."""
        total, work = 0, 0
        for step in steps:
            total += arena_of([Piece(step, 0, step.numel)]).nbytes
            whole = step.calibration is not None and step.calibration.needs_tensors
            plain = step.recipe is None or whole or self._backend == "torch"
            copies = working_bytes(step) if plain else _WORKSPACE
            work = max(work, 0 if step.copy else copies)
        return total + work

    def enter(self, lane: int, nbytes: int, check: Callable[[], None]) -> None:
        with self._changed:
            while self._used[lane] and self._used[lane] + nbytes > self._most[lane]:
                self._changed.wait(_POLL_SECONDS)
                check()
            self._used[lane] += nbytes

    def leave(self, lane: int, nbytes: int) -> None:
        with self._changed:
            self._used[lane] -= nbytes
            self._changed.notify_all()


def view_of(block: Tensor) -> memoryview:
    """The bytes of a block of the host."""
    array: Any = block.numpy()
    return memoryview(array)


def read_back(output: ShardFiles, piece: Piece, block: memoryview) -> Iterator[memoryview]:
    """The bytes of a piece as they are in the output, as many at a time as ``block`` holds."""
    start, nbytes = piece.byte_range(piece.step.dtype)
    for place in range(start, start + nbytes, len(block)):
        part = block[: min(len(block), start + nbytes - place)]
        output.read_into(piece.step.name, part, place)
        yield part

"""The three stages of a run on GPUs: tensors go up in pieces through blocks of page-locked memory,
are merged whole where they lie, and come down the same way.

What the host holds is these blocks, whatever the size of a tensor and whatever the method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from magic_fast import ops
from magic_fast.checkpoint import ShardFiles
from magic_fast.engine.execute.streamed import BadRecord, Loaded, Loader, refuse_unequal
from magic_fast.engine.execute.whole import DTYPES, Worker
from magic_fast.engine.execute.writer import Writer
from magic_fast.engine.gpu.arena import Area, Arena, arena_of
from magic_fast.engine.gpu.blocks import Blocks, Room, read_back, view_of
from magic_fast.engine.gpu.lanes import Lane, Mark
from magic_fast.engine.output.journal import Journal
from magic_fast.engine.output.recheck import refuse_changed_files
from magic_fast.engine.plan.memory import SLOTS, Slot
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.step import FLOATS, Step
from magic_fast.engine.plan.units import Piece, Unit
from magic_fast.ops.job import Stats
from magic_fast.recipe import Selection


class StagedLoader(Loader):
    """First stage: from the checkpoints to the arenas of the devices."""

    def __init__(
        self,
        plan: MergePlan,
        output: ShardFiles,
        journal: Journal,
        lanes: Sequence[Lane],
        slots: Sequence[Slot],
    ) -> None:
        super().__init__(plan.models, output, journal)
        self._lanes = lanes
        self._blocks = Blocks(slots, lanes[0])
        self._room = Room(plan, lanes)
        self.check: Callable[[], None] = lambda: None  # raises where the run has failed

    def __call__(self, unit: Unit, slot: Slot | None) -> None:
        pieces = []
        for piece in unit.pieces:
            loaded = Loaded(piece)
            record = self._journal.records.get((piece.step.name, piece.start, piece.stop))
            if record is not None:
                if self._checksum(piece) != record.checksum:
                    raise BadRecord(record.name)
                loaded.record = record
            pieces.append(loaded)
        todo = [one.piece for one in pieces if one.record is None]
        needed = self._room.needed([p.step for p in todo])
        self._room.enter(unit.lane, needed, self.check)
        unit.buffers["release"] = lambda: self._room.leave(unit.lane, needed)
        arena = arena_of(todo)
        memory, mark = self.upload(arena, unit.lane)
        unit.buffers |= {
            "pieces": pieces,
            "arena": arena,
            "memory": memory,
            "uploaded": mark,
            "bytes_read": sum(area.nbytes for row in arena.inputs for area in row),
        }

    def upload(self, arena: Arena, lane: int) -> tuple[Tensor, Mark]:
        """Reads all inputs of an arena into memory of a device; they are there at the mark."""
        device = self._lanes[lane]
        memory, mark = device.empty(arena.nbytes), None
        for start, parts in arena.chunks(self._blocks.size):
            block = self._blocks.take()
            view = view_of(block)
            reads = [(a.source, view[to : to + n], first) for a, first, to, n in parts if a.source]
            self._read(reads)
            refuse_changed_files(self._files[p] for p in {s.info.path for s, _, _ in reads})
            stop = max(to + n for _, _, to, n in parts)
            mark = device.upload(memory[start : start + stop], block[:stop])
            self._blocks.queued(block, device, mark)
        return memory, mark if mark is not None else device.upload(memory[:0], memory[:0])

    def _checksum(self, piece: Piece) -> str:
        """Of what an earlier run wrote, read back."""
        own, block = xxhash.xxh3_64(), self._blocks.take()
        assert self._output is not None
        for part in read_back(self._output, piece, view_of(block)):
            own.update(part)
        self._blocks.give_back(block)
        return own.hexdigest()

    def __enter__(self) -> StagedLoader:
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._blocks.close()


class StagedWorker(Worker):
    """Second stage: what lies in an arena is merged there."""

    def __init__(
        self,
        plan: MergePlan,
        nonfinite: str,
        lanes: Sequence[Lane],
        loader: StagedLoader,
        selections: Mapping[str, Selection],
    ) -> None:
        super().__init__(plan, nonfinite, selections)
        self._lanes = lanes
        self._loader = loader

    def _source(self, steps: Sequence[Step]) -> Iterator[tuple[Tensor | None, Sequence[Tensor]]]:
        for step in steps:
            arena = arena_of([Piece(step, 0, step.numel)])
            memory, mark = self._loader.upload(arena, 0)
            self._lanes[0].wait(mark)
            base, experts, _ = step.split(self._inputs_in(memory, arena.inputs[0], step))
            yield base, experts

    def __call__(self, unit: Unit) -> None:
        lane, arena, memory = (
            self._lanes[unit.lane],
            unit.buffers["arena"],
            unit.buffers["memory"],
        )
        todo = [n for n, one in enumerate(unit.buffers["pieces"]) if one.record is None]
        stats: list[Stats | None] = [None] * len(unit.pieces)
        unit.buffers["stats"] = stats
        if not todo:
            return
        plain = []
        with lane.merging(unit.buffers["uploaded"]) as mark:
            for n, row, out in zip(todo, arena.inputs, arena.outputs, strict=True):
                step = unit.pieces[n].step
                target = _typed(memory, out, step.dtype, step.shape)
                if step.copy:
                    self._copy_on_device(step, memory, row, target)
                    continue
                job, merged = self.job(step, self._inputs_in(memory, row, step), target)
                if self.is_plain(step):
                    plain.append((n, job))
                else:
                    stats[n] = self.merge(step, job, merged)
            found = ops.merge(
                [job for _, job in plain], backend=self._plan.backend, nonfinite=self._nonfinite
            )
            for (n, _), one in zip(plain, found, strict=True):
                stats[n] = one
            unit.buffers["merged"] = mark()

    def _inputs_in(self, memory: Tensor, row: Sequence[Area], step: Step) -> list[Tensor]:
        found = []
        for area in row:
            assert area.source is not None
            x = _typed(memory, area, area.source.info.dtype, area.source.shape)
            found.append(x if step.cast is None or step.copy else x.to(DTYPES[step.cast]))
        return found

    def _copy_on_device(
        self, step: Step, memory: Tensor, row: Sequence[Area], target: Tensor
    ) -> None:
        source = step.inputs[0]
        first = _bytes(memory, row[0])
        for other, area in zip(step.inputs[1:], row[1:], strict=True):
            same = other.info.dtype == source.info.dtype and torch.equal(
                _bytes(memory, area), first
            )
            refuse_unequal(step, other, same)
        if source.info.dtype in FLOATS:
            x = _typed(memory, row[0], source.info.dtype, source.shape)
            target.copy_(x if step.cast is None else x.to(DTYPES[step.cast]))
        else:
            target.view(-1).view(torch.uint8).copy_(first)


def _bytes(memory: Tensor, area: Area) -> Tensor:
    return memory[area.start : area.start + area.nbytes]


def _typed(memory: Tensor, area: Area, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies in an area; integers as bytes."""
    data = _bytes(memory, area)
    return data.view(DTYPES[dtype]).view(shape) if dtype in DTYPES else data


class StagedWriter(Writer):
    """Third stage: down from the device, block by block, and to the output."""

    def __init__(
        self,
        output: ShardFiles,
        journal: Journal,
        policy: str,
        lanes: Sequence[Lane],
        slots: Sequence[Slot],
    ) -> None:
        super().__init__(output, journal, policy)
        self._lanes = lanes
        self._blocks = Blocks(slots, lanes[0])
        self._unit: Unit | None = None

    def __call__(self, unit: Unit) -> None:
        self._unit = unit
        super().__call__(unit)
        self._unit = None

    def _parts(self, one: Loaded) -> Iterator[Any]:
        assert self._unit is not None
        if one.record is not None:
            block = self._blocks.take()
            yield from read_back(self._output, one.piece, view_of(block))
            self._blocks.give_back(block)
            return
        buffers = self._unit.buffers
        todo = [p.piece for p in buffers["pieces"] if p.record is None]
        area = buffers["arena"].outputs[todo.index(one.piece)]
        lane, data = self._lanes[self._unit.lane], _bytes(buffers["memory"], area)
        under_way: deque[tuple[Tensor, int, Mark]] = deque()
        starts = deque(range(0, area.nbytes, self._blocks.size))
        while starts or under_way:
            while starts and len(under_way) < SLOTS // 2:  # one is written, the next comes down
                start = starts.popleft()
                part = data[start : start + self._blocks.size]
                block = self._blocks.take()
                mark = lane.download(block[: part.numel()], part, buffers["merged"])
                under_way.append((block, part.numel(), mark))
            block, count, mark = under_way.popleft()
            lane.wait(mark)
            yield view_of(block)[:count]
            self._blocks.give_back(block)

    def __enter__(self) -> StagedWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._blocks.close()

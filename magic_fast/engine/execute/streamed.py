"""The first two stages of a run: fill a unit from the checkpoints, and merge it in its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from magic_fast import ops
from magic_fast.checkpoint import Checkpoint, ShardFiles
from magic_fast.engine.output.journal import Journal, Record
from magic_fast.engine.output.recheck import refuse_changed_files
from magic_fast.engine.plan.directions import directions_of, vector_length
from magic_fast.engine.plan.memory import Slot
from magic_fast.engine.plan.step import FLOATS, Input, Step
from magic_fast.engine.plan.units import Piece, Unit, element_size
from magic_fast.errors import InputError
from magic_fast.ops.directions import RowWeights
from magic_fast.ops.job import Job, Stats, View
from magic_fast.recipe import Recipe, Selection

_WORTH_SHARING = 1 << 19  # bytes for each of two threads
_Read = tuple[Input, memoryview, int]  # what, where to, from which of its bytes on


class BadRecord(Exception):
    """A piece that the journal calls done does not have its checksum; it must be done again."""


@dataclass(eq=False)
class Loaded:
    """One piece in memory: views of its inputs and its output."""

    piece: Piece
    inputs: list[tuple[Input, View, memoryview]] = field(default_factory=list)
    out: View | None = None
    out_bytes: Any = b""
    cast: list[View | None] = field(default_factory=list)
    record: Record | None = None  # already on disk, verified


def slab_shape(piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shape of the piece as an array, and the axes of its rows (None: as the calibration says)."""
    step = piece.step
    if piece.whole:
        return step.shape, None
    inner = step.numel // step.shape[0]
    if piece.start % inner == 0 and piece.count % inner == 0:
        return (piece.count // inner, *step.shape[1:]), None
    vector = vector_length(step)
    if step.calibration is not None:
        cols = step.calibration.cols
        row = (cols,) if vector is None else (cols // vector, vector)
        return (piece.count // cols, *row), (0,)
    return (piece.count,) if vector is None else (piece.count // vector, vector), None


class Loader:
    """First stage: bytes of checkpoints into the arrays of a unit.

    Two threads read: one alone gets half of what memory gives. As a context manager, ends the
    second.
    """

    def __init__(
        self, models: Mapping[str, Checkpoint], output: ShardFiles | None, journal: Journal
    ) -> None:
        self._helper = ThreadPoolExecutor(1, "magic-fast-read")
        self._models = models
        self._output = output
        self._journal = journal
        self._files = {f.path: f for model in models.values() for f in model.files}

    def __call__(self, unit: Unit, slot: Slot | None) -> None:
        reads: list[_Read] = []
        pieces = [self._piece(unit, piece, slot, reads) for piece in unit.pieces]
        self._read(reads)
        paths = {source.info.path for one in pieces for source, _, _ in one.inputs}
        refuse_changed_files(self._files[path] for path in paths)
        unit.buffers["pieces"] = pieces
        unit.buffers["bytes_read"] = sum(len(view) for one in pieces for *_, view in one.inputs)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self._helper.shutdown()

    def _read(self, reads: Sequence[_Read]) -> None:
        """All of them, in two halves of about as many bytes, each in the order of the files."""
        half, count = sum(len(view) for _, view, _ in reads) // 2, 0
        if half < _WORTH_SHARING:
            self._read_all(reads)
            return
        first = 0
        while count < half:
            count += len(reads[first][1])
            first += 1
        other = self._helper.submit(self._read_all, reads[first:])
        try:
            self._read_all(reads[:first])
        finally:
            wait([other])  # it writes into memory that others will use
        other.result()

    def _read_all(self, reads: Sequence[_Read]) -> None:
        for source, view, start in reads:
            self._models[source.model].read_into(source.info.name, view, start, len(view))

    def _piece(self, unit: Unit, piece: Piece, slot: Slot | None, reads: list[_Read]) -> Loaded:
        loaded = Loaded(piece)
        record = self._journal.records.get((piece.step.name, piece.start, piece.stop))
        if record is not None and unit.search is None:
            self._verify(loaded, record, slot)
            return loaded
        shape = (piece.count,) if unit.search is not None else slab_shape(piece)[0]
        for source in piece.step.inputs:
            start, nbytes = piece.byte_range(source.info.dtype)
            address, view = _take(slot, nbytes)
            reads.append((source, view, start))
            loaded.inputs.append((source, View(address, source.info.dtype, shape, view), view))
        if unit.torch:
            return loaded
        if piece.step.cast is not None and not piece.step.copy:
            for source in piece.step.inputs:
                loaded.cast.append(_array(slot, piece, piece.step.cast, shape, source))
        if unit.search is not None:
            return loaded
        address, view = _take(slot, piece.byte_range(piece.step.dtype)[1])
        loaded.out, loaded.out_bytes = View(address, piece.step.dtype, shape, view), view
        return loaded

    def _verify(self, loaded: Loaded, record: Record, slot: Slot | None) -> None:
        """What an earlier run wrote, read back; its checksum decides."""
        piece = loaded.piece
        start, nbytes = piece.byte_range(piece.step.dtype)
        _, view = _take(slot, nbytes)
        assert self._output is not None
        self._output.read_into(piece.step.name, view, start)
        if xxhash.xxh3_64_hexdigest(view) != record.checksum:
            raise BadRecord(record.name)
        loaded.record, loaded.out_bytes = record, view


def _take(slot: Slot | None, nbytes: int) -> tuple[int, memoryview]:
    if slot is not None:
        return slot.take(nbytes)
    return Slot(nbytes).take(nbytes)


def _array(
    slot: Slot | None, piece: Piece, dtype: str, shape: tuple[int, ...], source: Input
) -> View | None:
    """Room for an input rounded to ``dtype``, where it is of another."""
    if source.info.dtype == dtype:
        return None
    address, view = _take(slot, piece.count * element_size(dtype))
    return View(address, dtype, shape, view)


class Streamed:
    """Second stage, for units in slots: backends that stream, over borrowed memory.

    Args:
        nonfinite: ``error`` or ``propagate``.
        backend_of: name of the backend that merges a step.
        selections: of tensors for which they were found before.
    """

    def __init__(
        self,
        nonfinite: str,
        backend_of: Callable[[Step], str],
        selections: Mapping[str, Selection] | None = None,
    ) -> None:
        self._nonfinite = nonfinite
        self._backend_of = backend_of
        self.selections: dict[str, Selection] = dict(selections or {})
        self.weights: dict[str, RowWeights] = {}

    def __call__(self, unit: Unit) -> None:
        loaded: Sequence[Loaded] = unit.buffers["pieces"]
        if unit.search is not None:
            unit.search.feed([self._arrays(one) for one in loaded], [one.piece for one in loaded])
            return
        results: list[Stats | None] = [None] * len(loaded)
        jobs: dict[str, list[tuple[int, Job]]] = {}  # by backend
        for n, one in enumerate(loaded):
            if one.record is not None:
                continue
            backend = self._backend_of(one.piece.step)
            if one.piece.step.copy:
                self._copy(one)
            elif one.piece.step.merged is not None:
                job, merged = self._job(one)
                results[n] = ops.calibrate(job, merged, backend=backend, nonfinite=self._nonfinite)
            else:
                jobs.setdefault(backend, []).append((n, self._job(one)[0]))
        for backend, some in jobs.items():
            found = ops.merge([j for _, j in some], backend=backend, nonfinite=self._nonfinite)
            for (n, _), stats in zip(some, found, strict=True):
                results[n] = stats
        unit.buffers["stats"] = results

    def _arrays(self, one: Loaded) -> list[View]:
        """The inputs, rounded to the configuration's dtype where they are of another."""
        arrays = []
        targets = one.cast or [None] * len(one.inputs)
        for (_, view, _), target in zip(one.inputs, targets, strict=True):
            if target is not None:
                self._convert(one.piece.step, view, target)
            arrays.append(view if target is None else target)
        return arrays

    def _convert(self, step: Step, source: View, target: View) -> None:
        """Rounds one array to another's dtype: a merge of one task vector with weight 1."""
        job = Job(None, [source], Recipe((1.0,)), target)
        ops.merge([job], backend=self._backend_of(step), nonfinite=self._nonfinite)

    def _job(self, one: Loaded) -> tuple[Job, View | None]:
        """What is to be done, and the model merged elsewhere that is to be calibrated, if any."""
        step, piece = one.piece.step, one.piece
        base, arrays, merged = step.split(self._arrays(one))
        calibration = step.calibration
        if calibration is not None and not piece.whole:
            _, axes = slab_shape(piece)
            calibration = replace(
                calibration, rows=piece.count // calibration.cols, axes=axes or calibration.axes
            )
        job = Job(
            base,
            arrays,
            step.recipe or Recipe((1.0,) * len(arrays)),
            one.out,
            step.name,
            calibration=calibration,
            selection=self.selections.get(step.name),
            offset=piece.start,
            total=step.numel,
            directions=directions_of(step),
        )
        if step.name in self.weights:  # of all the tensor, so of any part of it
            job.weights = replace(self.weights[step.name], cols=piece.count)
        return job, merged

    def _copy(self, one: Loaded) -> None:
        step = one.piece.step
        source, view, data = one.inputs[0]
        for other, _, more in one.inputs[1:]:
            refuse_unequal(step, other, other.info.dtype == source.info.dtype and more == data)
        if source.info.dtype in FLOATS and not step.exact:
            assert one.out is not None
            self._convert(step, view, one.out)
        else:
            one.out_bytes = data


def refuse_unequal(step: Step, other: Input, same: bool) -> None:
    """Raises:
    InputError: a tensor that is only copied is not that of the first model.
    """
    if not same:
        first = step.inputs[0]
        what, rule = (
            ("scales of quantised weights", "They are")
            if first.info.dtype in FLOATS
            else ("integer tensor", "Integer tensors are")
        )
        raise InputError(
            f"{what} '{step.name}' in {other.model}: expected the values of "
            f"{first.model}, got others. {rule} not merged; they must agree."
        )

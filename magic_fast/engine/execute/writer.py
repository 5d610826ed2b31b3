"""The last stage of a run: writes the bytes of merged pieces, and records what they are."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

from magic_fast.checkpoint import ShardFiles
from magic_fast.engine.execute.streamed import Loaded
from magic_fast.engine.output.finite import nonfinite
from magic_fast.engine.output.journal import Journal, Record
from magic_fast.engine.plan.units import Piece, Unit
from magic_fast.ops.job import Stats, count_repaired, magnitudes_of


class Writer:
    """Third stage: bytes to the output, a checksum and a line in the journal for each piece.

    Where values that are not finite may pass, they are counted.
    """

    def __init__(self, output: ShardFiles, journal: Journal, policy: str) -> None:
        self._output = output
        self._journal = journal
        self.nonfinite: Counter[str] | None = Counter() if policy == "propagate" else None
        self._policy = policy
        self._hashers: dict[str, Any] = {}
        self.checksums: dict[str, str] = {}
        self.records: dict[str, list[Record]] = {}
        self.written = 0

    def __call__(self, unit: Unit) -> None:
        for n, one in enumerate(unit.buffers["pieces"]):
            piece: Piece = one.piece
            name, dtype = piece.step.name, piece.step.dtype
            start, nbytes = piece.byte_range(dtype)
            record = one.record
            if record is None:
                checksum = self._take(one, start, write=True)
                record = record_of(piece, unit.buffers["stats"][n], checksum)
                self._journal.add(record)
                self.written += nbytes
            else:
                if self._counts(piece) or not piece.whole:
                    self._take(one, start, write=False)
                self._output.mark_written(name, start, nbytes)
            self.records.setdefault(name, []).append(record)
            if piece.whole:
                self.checksums[name] = record.checksum

    def _take(self, one: Loaded, start: int, *, write: bool) -> str:
        """Everything there is to do with the bytes of a piece; its checksum."""
        piece = one.piece
        name, own, tensor = piece.step.name, xxhash.xxh3_64(), None
        if not piece.whole:  # the checksum of the whole tensor, which comes in pieces
            tensor = self._hashers.setdefault(name, xxhash.xxh3_64())
        for data in self._parts(one):
            if write and len(data):
                self._output.write(name, data, start)
            start += len(data)
            own.update(data)
            if tensor is not None:
                tensor.update(data)
            if self._counts(piece) and (count := nonfinite(data, piece.step.dtype)[0]):
                self.nonfinite = self.nonfinite or Counter()
                self.nonfinite[name] += count
        if tensor is not None and piece.stop == piece.step.numel:
            self.checksums[name] = self._hashers.pop(name).hexdigest()
        return own.hexdigest()

    def _counts(self, piece: Piece) -> bool:
        """Whether values that are NaN or infinite are let through."""
        return piece.step.exact or self._policy == "propagate"

    def _parts(self, one: Loaded) -> Iterator[Any]:
        """The bytes of a piece, one part behind the other."""
        yield one.out_bytes


def record_of(piece: Piece, stats: Stats | None, checksum: str) -> Record:
    """What the journal keeps of a merged piece."""
    record = Record(piece.step.name, piece.start, piece.stop, checksum)
    if stats is None:
        record.backend = "copy"
        return record
    record.backend = stats.backend
    if stats.coefficient is not None:
        values = stats.coefficient
        record.coefficient = array("f", values.tolist() if hasattr(values, "tolist") else values)
        record.repaired = count_repaired(stats)
        record.norms2 = tuple(float(x) for x in stats.extra.get("norms2", ()))
    return record


def magnitudes(records: Sequence[Record]) -> tuple[float | None, float | None]:
    """‖Δ‖_F ÷ mean_k ‖τ_k‖_F before and after calibration, over all pieces of a tensor."""
    parts = [r.norms2 for r in records if r.norms2]
    if not parts:
        return None, None
    before, after = magnitudes_of([math.fsum(column) for column in zip(*parts, strict=True)])
    if before is None or after is None:
        return None, None
    # six digits: in what pieces the sums were taken must not show
    return float(f"{before:.6g}"), float(f"{after:.6g}")

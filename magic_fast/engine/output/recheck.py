"""Re-checks on resume: bytes that an earlier run wrote, and that the inputs have not changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import xxhash

from magic_fast.checkpoint import Checkpoint, InputFile, ShardFiles
from magic_fast.engine.output.journal import Journal, Record
from magic_fast.engine.plan.step import Step
from magic_fast.engine.plan.units import element_size
from magic_fast.errors import CheckpointError

_BLOCK_BYTES = 4 << 20  # read back at a time


def drop_damaged(output: ShardFiles, journal: Journal, steps: Sequence[Step]) -> None:
    """Forgets every record whose bytes, read back, do not have its checksum: a crash of the system
    may have lost many."""
    by_name = {s.name: s for s in steps}
    block = memoryview(bytearray(_BLOCK_BYTES))
    for key, record in list(journal.records.items()):
        step = by_name.get(record.name)
        if step is None or not _is_sound(output, record, step, block):
            del journal.records[key]


def _is_sound(output: ShardFiles, record: Record, step: Step, block: memoryview) -> bool:
    if not 0 <= record.start <= record.stop <= step.numel:
        return False
    size = element_size(step.dtype)
    hasher = xxhash.xxh3_64()
    for start in range(record.start * size, record.stop * size, _BLOCK_BYTES):
        part = block[: min(_BLOCK_BYTES, record.stop * size - start)]
        output.read_into(record.name, part, start)
        hasher.update(part)
    return hasher.hexdigest() == record.checksum


def refuse_changed(models: Iterable[Checkpoint]) -> None:
    """`refuse_changed_files` of whole checkpoints."""
    refuse_changed_files(f for model in models for f in model.files)


def refuse_changed_files(files: Iterable[InputFile]) -> None:
    """Called after a read and before anything is made of it: the bytes were those of the file whose
    header was read.

    Raises:
        CheckpointError: a file was replaced, written to or removed since.
    """
    for file in files:
        try:
            status = os.stat(file.path)
            same = (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns)
            got = "another size or time"
        except OSError as error:
            same, got = False, error.strerror or str(error)
        if not same:
            raise CheckpointError(
                f"File changed while being read for {file.path}: expected the file whose header "
                f"was read, got {got}. Keep the inputs unchanged while they are read, then start "
                "again."
            )

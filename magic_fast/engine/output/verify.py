"""Whether a merged checkpoint on disk is what the run wrote: headers, index, checksums, finite
values."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from magic_fast.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo, open_checkpoint
from magic_fast.checkpoint.strict_json import json_file
from magic_fast.engine.output.finite import nonfinite
from magic_fast.engine.output.identity import label_of
from magic_fast.engine.output.record import RECORD_NAME
from magic_fast.engine.output.report import Progress
from magic_fast.models.fits import misfits

_BLOCK_BYTES = 8 << 20


@dataclass
class VerifyReport:
    """What was checked, and what is wrong.

    Attributes:
        tensors, nbytes: how much was read.
        checksums: tensors whose checksum the run recorded; 0 where another tool made the model.
        nonfinite: values that are NaN or infinite.
        fits: what told whether the tensors are those that config.json asks for; "" where nothing
            could.
        problems: one sentence each; empty: all is well.
        names: of the tensors.
    """

    out: str
    tensors: int = 0
    nbytes: int = 0
    checksums: int = 0
    nonfinite: int = 0
    fits: str = ""
    problems: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        plain = asdict(self) | {"ok": self.ok}
        del plain["names"]
        return plain


def read_record(folder: str | None) -> dict[str, Any]:
    """``magic_fast.json`` of an output folder; empty where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if folder is None:
        return {}
    return json_file(
        os.path.join(folder, RECORD_NAME), "Corrupt record of the merge", "Merge again"
    )


def verify_checkpoint(
    out: str | os.PathLike[str],
    *,
    progress: Callable[[Progress], None] | None = None,
    configuration: bool = True,
) -> VerifyReport:
    """Reads a checkpoint whole and says whether it is sound.

    Headers are parsed strictly and must agree with the index; every floating value must be finite
    (where the merge let others through: as many must not be as it recorded); where
    ``magic_fast.json`` holds checksums, every tensor must have its own; and the tensors must be
    those that ``config.json`` asks for, as far as its model type is known.

    Args:
        out: folder or ``.safetensors`` file.
        progress: called after each tensor.
        configuration: compare with ``config.json``; with transformers installed, that imports it.

    Raises:
        CheckpointError: it cannot be opened at all.

    >>> verify_checkpoint("merged").ok  # doctest: +SKIP
    True
    """
    report = VerifyReport(os.fspath(out))
    with open_checkpoint(out) as model:
        record = read_record(model.folder)
        checksums = record.get("checksums", {}).get("tensors", {})
        allowed = _allowed(model, record)
        for name in sorted(checksums.keys() - set(model)):
            report.problems.append(
                f"tensor '{name}': recorded by the merge, missing from the files"
            )
        if configuration and model.config:
            headers = {name: (info.shape, info.dtype) for name, info in model.tensors.items()}
            found, report.fits = misfits(model.config, headers, model.roles)
            report.problems += found
        done = 0
        for info in model.tensors.values():
            count = allowed.get(info.name, 0) if allowed is not None else None
            _check_tensor(model, info, checksums, count, report)
            done += info.nbytes
            if progress is not None:
                progress(Progress(done, model.nbytes, info.name))
    return report


def _check_tensor(
    model: Checkpoint,
    info: TensorInfo,
    checksums: dict[str, str],
    allowed: int | None,
    report: VerifyReport,
) -> None:
    """``allowed`` values may be NaN or infinite, and must; None: any number may."""
    hasher = xxhash.xxh3_64()
    buffer = bytearray(min(_BLOCK_BYTES, info.nbytes))
    count, bad = 0, None
    for start in range(0, info.nbytes, _BLOCK_BYTES):
        view = memoryview(buffer)[: min(_BLOCK_BYTES, info.nbytes - start)]
        model.read_into(info.name, view, start, len(view))
        hasher.update(view)
        found, first = nonfinite(view, info.dtype)
        count += found
        if bad is None and first is not None:
            bad = start * 8 // DTYPE_BITS[info.dtype] + first
    report.tensors += 1
    report.names.append(info.name)
    report.nbytes += info.nbytes
    report.nonfinite += count
    if allowed is not None and count != allowed:
        where = "" if bad is None else f", the first at flat index {bad}"
        told = f" where the merge wrote {allowed}" if allowed else ""
        report.problems.append(
            f"tensor '{info.name}' in {os.path.basename(info.path)}: {count} values are NaN or "
            f"infinite{told}{where}"
        )
    expected = checksums.get(info.name)
    if expected is not None:
        report.checksums += 1
        if hasher.hexdigest() != expected:
            report.problems.append(
                f"tensor '{info.name}' in {os.path.basename(info.path)}: its bytes are not those "
                f"that were written (checksum {hasher.hexdigest()}, recorded {expected})"
            )
    elif checksums:
        report.problems.append(f"tensor '{info.name}': in the files, not recorded by the merge")


def _allowed(model: Checkpoint, record: dict[str, Any]) -> dict[str, int] | None:
    """Tensor → values that are NaN or infinite, as the merge recorded; empty where it refused
    them; None where it let them through and did not count."""
    counts = record.get("nonfinite", {})
    if isinstance(counts, dict):
        label = label_of(model) if model.folder is None else None
        return None if label and label.settings.get("nonfinite") == "propagate" else counts
    return {}

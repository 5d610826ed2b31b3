"""Statistics of checkpoints on disk, and the record of how one of them was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magic_fast.api.tensors.stats import TensorStatistics, statistics_of
from magic_fast.engine import Progress, common_shape
from magic_fast.engine.output.verify import read_record
from magic_fast.engine.plan.step import FLOATS
from magic_fast.errors import InputError
from magic_fast.planning.options import ProgressCall
from magic_fast.planning.outputs import closing
from magic_fast.planning.sources import open_named
from magic_fast.planning.steps import input_of, read_tensor


def inspect_checkpoints(
    base: str | Path,
    experts: Sequence[str | Path],
    merged: str | Path | None = None,
    *,
    before: str | Path | None = None,
    progress: ProgressCall | None = None,
) -> list[TensorStatistics]:
    """Norms, cosines, sign conflicts and magnitude deviations of every floating tensor.

    Where ``merged`` has the record of a calibration (``magic_fast.json``), the coefficients that
    were applied and the magnitudes before it come from there.

    Args:
        base, experts, merged: checkpoints of one architecture.
        before: what ``merged`` was before it was calibrated, to compare with.
        progress: called after each tensor.

    Returns:
        One :class:`TensorStatistics` per tensor, in the base's order.

    Raises:
        InputError: no experts, ``before`` without ``merged``, or tensors of unequal shapes.
        CheckpointError: a checkpoint that cannot be read, or lacks a tensor.
    """

    if not experts:
        raise InputError("experts: expected at least one checkpoint, got none.")
    if before is not None and merged is None:
        raise InputError("before: expected a merged model beside it, got none. Pass merged.")
    others = [str(model) for model in (merged, before) if model is not None]
    names = [str(base), *map(str, experts), *others]
    models = open_named(names)
    with closing(models):
        found, done = [], 0
        rows = {
            name: [input_of(models, m, name) for m in names]
            for name in models[names[0]]
            if models[names[0]].resolve(name).dtype in FLOATS
        }
        total = sum(i.nbytes for row in rows.values() for i in row)
        recorded = {t["name"]: t for t in record_of(merged).get("tensors", ())}
        roles = models[names[0]].roles
        for name, row in rows.items():
            common_shape(name, row)
            tensors = [read_tensor(models, i.model, name) for i in row]
            own = tensors[1 : 1 + len(experts)]
            rest = [*tensors[1 + len(experts) :], None, None]
            found.append(
                statistics_of(tensors[0], own, rest[0], name, before=rest[1], role=roles[name])
            )
            _add_recorded(found[-1], recorded.get(name, {}))
            done += sum(i.nbytes for i in row)
            if progress is not None:
                progress(Progress(done, total, name))
    return found


def record_of(merged: str | Path | None) -> dict[str, Any]:
    """``magic_fast.json`` of a merged model; empty where there is none."""
    return read_record(str(merged) if merged is not None and Path(merged).is_dir() else None)


def _add_recorded(found: TensorStatistics, record: Mapping[str, Any]) -> None:
    if record.get("coefficient_quantiles") is None:
        return
    found.calibrated = True
    found.coefficients = tuple(record["coefficient_quantiles"])
    if found.magnitude_before is None:
        found.magnitude_before = record["magnitude_before"]

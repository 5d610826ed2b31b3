"""Checks a finished output when its run is resumed: it is the result of this run, and sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from magic_fast.checkpoint import open_checkpoint
from magic_fast.checkpoint.staging import Staging
from magic_fast.engine import MergePlan, MergeReport, TensorReport
from magic_fast.engine.output.identity import Identity, identity_of, label_of, name_of, plain
from magic_fast.engine.output.record import RECORD_NAME
from magic_fast.engine.output.verify import VerifyReport, read_record, verify_checkpoint
from magic_fast.errors import CheckpointError, InputError


def verified(plan: MergePlan, nonfinite: str) -> MergeReport:
    """The report of a finished result that ``resume`` found, verified against its own record and
    the plan.

    Raises:
        InputError: it is the result of another configuration, seed, calibration or backend, or of
            other inputs; the message names which.
        CheckpointError: it is damaged.
    """
    record = read_record(plan.out if Path(plan.out).is_dir() else None)
    now = identity_of(plan, nonfinite)
    before = _recorded_identity(plan.out, record)
    if before is None:
        differs = ["it does not say what run made it"]
    else:  # a newer version may verify what an older one made
        before = replace(before, version=now.version)
        differs = [*before.differences(now.timeless()), *_written_since(plan)]
    if differs:
        raise InputError(
            f"resume for {plan.out!r}: expected the result of this run, got a finished one of "
            f"another: {'; '.join(differs)}. Name another output, or remove it."
        )
    found = _sound(plan.out, "merge", {s.name for s in plan.steps})
    warnings = [*plan.warnings, "it was finished already, and is verified"]
    report = MergeReport(plan.out, plan.method, str(record.get("backend", "")), warnings=warnings)
    report.bytes_read = found.nbytes
    known = {t["name"]: t for t in record.get("tensors", ())}
    report.tensors = [
        TensorReport(**({"name": s.name} | known.get(s.name, {}) | {"shape": s.shape}))
        for s in plan.steps
    ]
    return report


def finished(out: str, recipe: str, settings: Mapping[str, Any]) -> MergeReport:
    """The report of a finished result that ``resume`` found, verified against its own record, where
    running again is what would tell whether the plan is the same.

    Raises:
        InputError: it is the result of other settings, models or samples.
        CheckpointError: it is damaged.
    """
    record = read_record(out if Path(out).is_dir() else None)
    was = record.get("settings") or {}
    now = {k: plain(v) for k, v in settings.items()}
    differs = sorted(k for k in now if was.get(k) != now[k])
    if record.get("recipe") != recipe:
        differs.append("the configuration")
    if differs:
        raise InputError(
            f"resume for {out!r}: expected the result of this run, got a finished one of another: "
            f"{', '.join(differs)} differ. Name another output, or remove it."
        )
    found = _sound(out, "calibrate")
    report = MergeReport(out, str(record["method"]), str(record["backend"]))
    report.warnings = [*record["warnings"], "it was finished already, and is verified"]
    report.bytes_read = found.nbytes
    report.tensors = [TensorReport(**({"shape": ()} | t)) for t in record["tensors"]]
    report.layers = list(record.get("layers", ()))
    report.left = dict(record.get("left", {}))
    return report


def _sound(out: str, verb: str, names: set[str] | None = None) -> VerifyReport:
    """What verifying a finished output found, which holds the tensors of ``names``.

    Raises:
        CheckpointError: it is damaged; the advice is to ``verb`` again.
    """
    Staging.clear(out)
    found = verify_checkpoint(out, configuration=False)
    if names is not None and (odd := sorted(names ^ set(found.names))):
        found.problems.append(f"tensor '{odd[0]}': expected the tensors of the plan")
    if not found.ok:
        raise CheckpointError(
            f"output for {out!r}: expected a sound result of this run, got: "
            f"{'; '.join(found.problems[:3])}. Remove it and {verb} again."
        )
    return found


def _recorded_identity(out: str, record: Mapping[str, Any]) -> Identity | None:
    """What run made a finished output, as its record or its one file says."""
    if Path(out).is_file():
        with open_checkpoint(out) as model:
            return label_of(model)
    try:
        files = [
            {
                "path": name_of(f["model"], f["file"], f["file"] == f["model"]),
                "size": f["size"],
                "mtime_ns": 0,
                "header_hash": f["header_sha256"],
            }
            for f in record["inputs"]
        ]
        own = {"recipe": record["recipe"], "settings": record["settings"], "inputs": files}
        return Identity.from_dict({**record["identity"], **own})
    except (KeyError, TypeError, ValueError):
        return None


def _written_since(plan: MergePlan) -> list[str]:
    """Inputs that changed after the output was finished; it holds no times of them."""
    path = Path(plan.out)
    made = (path / RECORD_NAME if path.is_dir() else path).stat().st_mtime_ns
    files = (f for model in plan.models.values() for f in model.files)
    return [
        f"{f.path}: it was written to since (its modification time is later than the output's)"
        for f in files
        if f.mtime_ns > made
    ]

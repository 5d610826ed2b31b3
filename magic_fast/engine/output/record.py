"""Writes the files beside the merged weights (model card, ``magic_fast.json``) and checks them when
a run is resumed."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from magic_fast._version import __version__
from magic_fast.checkpoint import OutputFolder, copy_sidecars, open_checkpoint, sidecar_source
from magic_fast.checkpoint.staging import Staging
from magic_fast.engine import MergePlan, MergeReport, TensorReport, Written
from magic_fast.engine.output.identity import Identity, identity_of, label_of, name_of, plain
from magic_fast.engine.output.verify import RECORD_NAME, read_record, verify_checkpoint
from magic_fast.engine.plan.step import FLOATS
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
    Staging.clear(plan.out)
    found = verify_checkpoint(plan.out)
    expected, stored = {s.name for s in plan.steps}, set(found.names)
    if expected != stored:
        odd = sorted(expected ^ stored)[0]
        found.problems.append(f"tensor '{odd}': expected the tensors of the plan")
    if not found.ok:
        raise CheckpointError(
            f"output for {plan.out!r}: expected a sound result of this run, got: "
            f"{'; '.join(found.problems[:3])}. Remove it and merge again."
        )
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
    Staging.clear(out)
    found = verify_checkpoint(out)
    if not found.ok:
        raise CheckpointError(
            f"output for {out!r}: expected a sound result of this run, got: "
            f"{'; '.join(found.problems[:3])}. Remove it and calibrate again."
        )
    report = MergeReport(out, str(record["method"]), str(record["backend"]))
    report.warnings = [*record["warnings"], "it was finished already, and is verified"]
    report.bytes_read = found.nbytes
    report.tensors = [TensorReport(**({"shape": ()} | t)) for t in record["tensors"]]
    report.layers = list(record.get("layers", ()))
    return report


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


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"magic_fast": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _input_records(plan: MergePlan) -> list[dict[str, Any]]:
    """What identifies the inputs, wherever they lie."""
    return [
        {
            "model": reference,
            "file": reference if model.is_file else Path(f.path).name,
            "size": f.size,
            "header_sha256": f.header_hash,
        }
        for reference, model in plan.models.items()
        for f in model.files
    ]


def write_small_files(
    plan: MergePlan, report: MergeReport, output: OutputFolder, written: Written
) -> None:
    """Configuration and tokenizer from the donor, the model card, and ``magic_fast.json``."""
    if output.is_file:
        return
    from magic_fast.engine.output.card import model_card

    donor = plan.models[plan.donor]
    source = sidecar_source(donor, list(plan.models.values()))
    dtypes = {s.dtype for s in plan.steps if s.dtype in FLOATS}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if source is not None:
        copy_sidecars(
            source,
            output,
            dtype=dtype,
            num_layers=plan.num_layers,
            vocab_size=plan.vocab_size,
            tokenizer=plan.tokenizer,
        )
    versions = _versions()
    output.write_text(
        "README.md",
        model_card(report, models=list(plan.models), recipe=plan.recipe_text, versions=versions),
    )
    record = {
        "format": 1,
        "versions": versions,
        "method": plan.method,
        "backend": report.backend,
        "recipe": plan.recipe_text,
        "settings": written.identity.settings,
        "identity": {
            k: v
            for k, v in written.identity.as_dict().items()
            if k not in ("recipe", "settings", "inputs")
        },
        "inputs": _input_records(plan),
        "tensors": [
            {k: v for k, v in vars(t).items() if k != "shape"}
            for t in report.tensors
            if t.calibrated
        ],
        "checksums": {"algorithm": "xxh3_64", "tensors": dict(written.checksums)},
        "warnings": report.warnings,
    }
    if report.layers:
        record["layers"] = report.layers
    if written.nonfinite is not None:
        record["nonfinite"] = {name: n for name, n in written.nonfinite.items() if n}
    output.write_text(RECORD_NAME, json.dumps(record, indent=1, allow_nan=False) + "\n")

"""Writes the files beside the merged weights: model card and record (``magic_fast.json``)."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from magic_fast._version import __version__
from magic_fast.checkpoint import OutputFolder, copy_sidecars, sidecar_source
from magic_fast.engine import MergePlan, MergeReport, Written
from magic_fast.engine.plan.step import FLOATS

RECORD_NAME = "magic_fast.json"


def versions_used() -> dict[str, str]:
    """Name → version of what takes part in a merge."""
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
    source = plan.files or sidecar_source(donor, list(plan.models.values()))
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
            untied=plan.untied,
            config=plan.config,
        )
    versions = versions_used()
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
        record["left"] = report.left
    if written.nonfinite is not None:
        record["nonfinite"] = {name: n for name, n in written.nonfinite.items() if n}
    output.write_text(RECORD_NAME, json.dumps(record, indent=1, allow_nan=False) + "\n")

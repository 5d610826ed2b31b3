"""The files of merged adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from magic_fast.adapters import Adapter
from magic_fast.adapters.merged import has_alphas, merged_config, merged_header
from magic_fast.adapters.opening import CONFIG_NAME, DIFFUSERS_NAME, KOHYA_BASE_KEY, WEIGHTS_NAME
from magic_fast.api.results import AdapterReport
from magic_fast.checkpoint import FORMAT_METADATA, OutputFolder, TensorSpec, plan_shards
from magic_fast.engine.execute.whole import DTYPES, as_bytes
from magic_fast.engine.output.card import adapter_card
from magic_fast.engine.output.record import versions_used

WORDS = {dtype: word for word, dtype in DTYPES.items()}


def write(
    target: str,
    opened: Sequence[Adapter],
    report: AdapterReport,
    tensors: dict[str, Tensor],
    base_model: str | None,
    recipe: Mapping[str, Any],
) -> None:
    """The files, which appear once, whole."""
    lora = report.kind == "lora"
    ranks = {m.name: m.rank for m in report.modules if m.rank} if lora else {}
    if has_alphas(opened):  # the scaling is in the factors: α = r
        tensors |= {f"{name}.alpha": torch.tensor(float(rank)) for name, rank in ranks.items()}
    with OutputFolder(target) as output:
        name = WEIGHTS_NAME if report.style == "peft" else DIFFUSERS_NAME
        if output.is_file:
            name = os.path.basename(output.path)
        specs = [TensorSpec(key, WORDS[t.dtype], tuple(t.shape)) for key, t in tensors.items()]
        metadata = {**FORMAT_METADATA, **merged_header(opened, ranks)}
        if report.style == "kohya" and base_model is not None:
            metadata[KOHYA_BASE_KEY] = base_model
        output.create_shards(plan_shards(specs, file_name=name, metadata=metadata))
        for key, tensor in tensors.items():
            output.write(key, as_bytes(tensor))
        if report.style == "peft":
            config = merged_config(opened, ranks, base_model)
            output.write_text(CONFIG_NAME, json.dumps(config, indent=2) + "\n")
            output.write_text("README.md", adapter_card(
                os.path.basename(output.path), f"Merged by `{report.method}` with magic_fast.",
                base_model=base_model, adapters=[a.path for a in opened], recipe=recipe,
                versions=versions_used(), warnings=report.warnings,
            ))  # fmt: skip
        report.out = output.finalise()

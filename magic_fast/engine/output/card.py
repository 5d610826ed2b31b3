"""The README.md of an output folder: what was merged from what, and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from magic_fast.engine.output.report import MergeReport


def model_card(
    report: MergeReport, *, models: Sequence[str], recipe: str, versions: Mapping[str, str]
) -> str:
    """A model card with the front matter that the Hugging Face Hub reads.

    Args:
        report: of the finished merge. Its times are left out: the same merge gives the same card.
        models: base first, then the experts, as the configuration names them.
        recipe: the configuration as YAML.
        versions: name → version of what took part.
    """
    front = {
        "base_model": list(dict.fromkeys(models)),
        "library_name": "transformers",
        "tags": ["merge", "magic_fast"],
    }
    calibrated = sum(tensor.calibrated for tensor in report.tensors)
    calibration = (
        f" The magnitudes of {calibrated} of {len(report.tensors)} tensors were calibrated "
        "(WSC, [arXiv 2512.19320](https://arxiv.org/abs/2512.19320))."
        if calibrated
        else ""
    )
    if report.layers:
        layers = sum(not layer["note"] for layer in report.layers)
        calibration += f" The task features of {layers} layers were calibrated (FSC of MAGIC)."
    title = PurePath(report.out).name
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {title}",
            "",
            f"Merged by `{report.method}` with magic_fast.{calibration}",
            "",
            "## Models",
            "",
            *(f"* `{model}`" for model in dict.fromkeys(models)),
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe.rstrip(),
            "```",
            "",
            *([f"Warning: {warning}\n" for warning in report.warnings]),
            "Made with "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ".",
            "",
        ]
    )

"""The README.md of an output folder: what was merged from what, and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

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
    front = {
        "base_model": list(dict.fromkeys(models)),
        "library_name": "transformers",
        "tags": ["merge", "magic_fast"],
    }
    sentence = f"Merged by `{report.method}` with magic_fast.{calibration}"
    return _card(
        front, PurePath(report.out).name, sentence, models, recipe, report.warnings, versions
    )


def adapter_card(
    title: str,
    sentence: str,
    *,
    base_model: str | None,
    adapters: Sequence[str],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    warnings: Sequence[str] = (),
) -> str:
    """The card of an adapter, with the front matter that PEFT writes.

    Args:
        sentence: what it is.
        adapters: it was merged from.
        recipe: the call that made it.
    """
    front: dict[str, Any] = {} if base_model is None else {"base_model": base_model}
    tags = [f"base_model:adapter:{base_model}"] if base_model else []
    front |= {"library_name": "peft", "tags": [*tags, "lora", "magic_fast"]}
    if adapters:
        front["tags"] += ["merge"]
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    models = [*([base_model] if base_model else []), *adapters]
    return _card(front, title, sentence, models, text, warnings, versions)


def _card(
    front: Mapping[str, Any],
    title: str,
    sentence: str,
    models: Sequence[str],
    recipe: str,
    warnings: Sequence[str],
    versions: Mapping[str, str],
) -> str:
    return "\n".join(
        [
            "---",
            yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {title}",
            "",
            sentence,
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
            *([f"Warning: {warning}\n" for warning in warnings]),
            "Made with "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ".",
            "",
        ]
    )

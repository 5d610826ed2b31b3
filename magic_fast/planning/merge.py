"""The plan of one merge."""

from __future__ import annotations

from collections.abc import Sequence

from magic_fast.calibration import WeightCalibration
from magic_fast.config import MergeConfig
from magic_fast.engine import MergePlan, Step, place
from magic_fast.planning.layers import config_of_layers
from magic_fast.planning.options import RunOptions
from magic_fast.planning.steps import steps_of
from magic_fast.planning.vocabulary import Aligned

ONE_EXPERT = "calibrating the merge of one expert gives back a full-size task vector"


def plan_merge(
    config: MergeConfig,
    aligned: Aligned,
    out: str,
    options: RunOptions,
    *,
    calibration: WeightCalibration | None,
    seed: int,
    compat: str | None,
    allow_embedding_truncation: bool,
) -> MergePlan:
    """Steps, places and settings of a merge, from models of one vocabulary.

    Args:
        config: what to merge.
        aligned: the models, opened.
        out: where the result goes.
        options: ``device`` is one of this machine.
        calibration, seed, compat, allow_embedding_truncation: as of
            :func:`magic_fast.merge_checkpoints`, defaults filled in.
    """
    steps, vocab_size = steps_of(
        config,
        aligned.models,
        calibration,
        seed=seed,
        compat=compat,
        allow_truncation=allow_embedding_truncation,
    )
    layers, num_layers = config_of_layers(config, aligned.models, aligned.files)
    settings = {
        "seed": seed,
        "calibrate": calibration,
        "preset": config.preset,
        "dtype": config.dtype,
        "out_dtype": config.out_dtype,
        "compat": compat,
        "allow_embedding_truncation": allow_embedding_truncation,
        **aligned.settings,
    }
    return MergePlan(
        config.merge_method,
        steps,
        place(steps, out, options.max_shard_size, aligned.files or aligned.models[config.donor]),
        aligned.models,
        config.donor,
        out,
        options.backend,
        num_layers,
        vocab_size or aligned.rows,
        config.to_yaml(),
        [*config.warnings, *aligned.warnings],
        options.memory,
        options.device,
        settings,
        aligned.tokenizer,
        aligned.untied,
        layers,
        aligned.files,
    )


def merges_one_expert(steps: Sequence[Step]) -> bool:
    """Whether no step merges more than one expert."""
    return max((len(step.experts) for step in steps if not step.copy), default=0) == 1

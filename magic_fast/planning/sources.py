"""What a run on checkpoints reads: its configuration and its models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from magic_fast.checkpoint import Checkpoint, ModelFolder, open_checkpoint, open_folder
from magic_fast.config import MergeConfig
from magic_fast.config.references import find_model
from magic_fast.errors import InputError
from magic_fast.planning.pause_gc import no_collection
from magic_fast.planning.quantised import QuantisedInputs

_OF_AN_ADAPTER = re.compile(r"[._](lora|hada|lokr|ia3|oft|boft|vera)_|\.(alpha|dora_scale)$")


def read_config(config: str | Path | MergeConfig | Mapping[str, Any]) -> MergeConfig:
    """A configuration from a path, YAML text, a mapping, or one already read."""
    if isinstance(config, MergeConfig):
        return config
    if isinstance(config, Mapping):
        return MergeConfig.from_dict(config)
    if isinstance(config, str) and ("\n" in config or ": " in config):
        return MergeConfig.from_yaml(config)
    return MergeConfig.from_file(config)


@no_collection()
def open_models(references: Mapping[str, tuple[Path, Path | None]]) -> dict[str, Checkpoint]:
    """Reference → checkpoint, of where each model and its adapter lie."""
    models: dict[str, Checkpoint] = {}
    try:
        for reference, (path, adapter) in references.items():
            models[reference] = open_model(path, adapter)
        QuantisedInputs(models)
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return models


def small_files(
    config: MergeConfig, reference: str, models: Mapping[str, Checkpoint]
) -> Checkpoint | ModelFolder:
    """What has the small files of a model that ``config`` names, merged or not.

    Raises:
        ConfigError, CheckpointError: it is not there, or no folder.
    """
    model = models.get(reference)
    if model is not None and model.folder is not None:
        return model
    return open_folder(str(config.resolve_path(reference)))


def open_model(path: Path, adapter: Path | None = None) -> Checkpoint:
    """`open_checkpoint`, with an adapter on it where one is named."""
    if adapter is None:
        model = open_checkpoint(path)
        if model and all(map(_OF_AN_ADAPTER.search, model)):
            model.close()
            raise InputError(
                f"model {str(path)!r}: expected whole weights, got an adapter, whose factors are "
                "not merged one by one. Write MODEL+ADAPTER, or use magic-fast merge-adapters."
            )
        return model
    from magic_fast.engine.sources.adapted import open_adapted

    return open_adapted(partial(open_checkpoint, path), adapter)


def open_named(names: Iterable[str]) -> dict[str, Checkpoint]:
    """Checkpoints by their paths, ``model+adapter`` among them; what is quantised in them is the
    same in all."""
    models = open_models({n: find_model(n, None) or (Path(n), None) for n in names})
    try:
        QuantisedInputs(models).refuse_unequal()
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return models

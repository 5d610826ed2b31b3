"""The entry of a model type that the table lacks, made by the installed transformers.

No code of a checkpoint is run, only classes of transformers itself; no weights are made.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from magic_fast.models.table import Entry, entry_of

_LOG = logging.getLogger("magic_fast")


def entry_by_transformers(config: Mapping[str, Any]) -> Entry | None:
    """The entry of the configuration's type, or None where transformers is not installed, does not
    know it, or cannot build it."""
    if find_spec("transformers") is None or find_spec("torch") is None:
        return None
    model_type = str(config.get("model_type", ""))
    try:
        from magic_fast.models.built import classes, entries

        if model_type not in classes.model_types():
            return None

        def kind_of_part(part: str, name: str) -> str | None:
            if entry_of(part) is None:
                return None
            return "base" if name == classes.base_name(part) else None

        make = functools.partial(classes.config_class(model_type).from_dict, _own_code(config))
        description = entries.describe(model_type, kind_of_part, make)
    except Exception as error:  # another release of transformers
        _LOG.debug("no roles of %s by transformers: %s", model_type, error)
        return None
    return description.entry() if description.primary else None


def parameters_by_transformers(
    config: Mapping[str, Any], architecture: str
) -> dict[str, tuple[int, ...]] | None:
    """Name → shape of what a model of this configuration must find in its files, or None where
    transformers is not installed or cannot build it. Tied copies are left out."""
    if find_spec("transformers") is None or find_spec("torch") is None:
        return None
    try:
        from magic_fast.models.built import classes

        made = classes.config_class(str(config["model_type"])).from_dict(_own_code(config))
        model = classes.built(architecture, made)
        state = model.state_dict()
    except Exception as error:  # another release of transformers, a missing package
        _LOG.debug("%s is not built by transformers: %s", architecture, error)
        return None
    tied = {name for name, source in model.all_tied_weights_keys.items() if source in state}
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or "$^")
    return {
        name: tuple(x.shape)
        for name, x in state.items()
        if not (name in tied or name.endswith("num_batches_tracked") or optional.search(name))
    }


def _own_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what would ask for code of the checkpoint."""
    return {
        key: _own_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "auto_map"
    }

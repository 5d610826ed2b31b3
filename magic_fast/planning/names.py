"""One tensor under several names: the models of a merge in the names of one of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from magic_fast.checkpoint import Checkpoint
from magic_fast.engine.sources.tied import TiedCheckpoint
from magic_fast.errors import CheckpointError

_LOG = logging.getLogger("magic_fast")


def settle_names(models: Mapping[str, Checkpoint], donor: str) -> dict[str, Checkpoint]:
    """The models in the names of the donor.

    Files of one model differ in their names: with and without the prefix of the base model, of
    wrappers (``module.``, ``_orig_mod.``), of a release that nests the parts of a model otherwise.
    Names that differ are matched by the name in transformers' module tree, one to one, where the
    tensor is the same one as it is stored; what the donor has under its own name stays.

    Raises:
        CheckpointError: the same parameters are stored in another layout.
    """
    first = models[donor]
    settled = {}
    for reference, model in models.items():
        lacking = [name for name in first.tensors if name not in model]
        renamed = _renamed(first, model, lacking) if lacking else {}
        settled[reference] = model
        if renamed:
            name, stored = next(iter(renamed.items()))
            _LOG.warning(
                "%s: %d tensors go by the names of %s: %s is %s there.",
                reference, len(renamed), donor, stored, name,
            )  # fmt: skip
            aliases = {stored: name for name, stored in renamed.items()}
            settled[reference] = TiedCheckpoint(model, aliases, renamed)
    return settled


def _renamed(first: Checkpoint, model: Checkpoint, lacking: list[str]) -> dict[str, str]:
    """Name of ``first`` → the stored name of the same tensor in ``model``."""
    others: dict[str, list[str]] = {}
    for name in model.tensors:
        if name not in first.tensors:
            others.setdefault(model.roles[name].canonical, []).append(name)
    found = {}
    for name in lacking:
        role = first.roles[name]
        stored = others.get(role.canonical, [])
        if stored and model.roles[stored[0]].layout != role.layout:
            raise CheckpointError(
                f"layout of {model.path}: expected {name} as in {first.path}, got {stored[0]}, "
                "which holds the same parameters in another layout. Save both models by one "
                "release of transformers, in the same format."
            )
        same = len(stored) == 1 and model.roles[stored[0]].targets == role.targets
        if same and first.tensors[name].shape == model.tensors[stored[0]].shape:
            found[name] = stored[0]
    return found

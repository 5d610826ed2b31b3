"""One tensor under several names: the models of a merge in the names of one of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from magic_fast.checkpoint import Checkpoint
from magic_fast.engine.sources.renamed import RenamedCheckpoint
from magic_fast.errors import CheckpointError
from magic_fast.models import roles_of
from magic_fast.models.matching import match, text_parts
from magic_fast.models.roles import Tensors

_LOG = logging.getLogger("magic_fast")


def settle_names(models: Mapping[str, Checkpoint], donor: str) -> dict[str, Checkpoint]:
    """The models in the names of the donor.

    Files of one model differ in their names: with and without the prefix of the base model, of
    wrappers (``module.``, ``_orig_mod.``), of a release that nests the parts of a model otherwise.
    Names that differ are matched by the name in transformers' module tree, one to one, where the
    tensor is the same one as it is stored, or consists of ranges of bytes of the others (experts
    stacked or single); what the donor has under its own name stays. The tensors of a text model
    meet those of the text part of a multimodal one.

    Raises:
        CheckpointError: the same parameters are stored in another layout.
    """
    first = models[donor]
    settled = {}
    for reference, model in models.items():
        settled[reference] = model
        if model is first:
            continue
        made, hidden = {}, []
        if not first.tensors.keys() <= model.tensors.keys():
            made = match(first.roles, _headers(first), model.roles, _headers(model))
        if made:
            name, one = next(iter(made.items()))
            _LOG.warning(
                "%s: %d tensors go by the names of %s: %s is %s there.",
                reference, len(made), donor, one.pieces[0].name, name,
            )  # fmt: skip
        of_text = text_parts(first.roles, model.roles)
        if of_text is not None and model.roles.parts:
            used = {piece.name for one in made.values() for piece in one.pieces}
            hidden = [name for name in model.tensors if name not in used and name not in first]
            if hidden:
                _LOG.warning(
                    "%s: %d tensors outside its text part are left out, %s among them: %s is a "
                    "text model.", reference, len(hidden), hidden[0], donor,
                )  # fmt: skip
        if made or hidden:
            renamed = settled[reference] = RenamedCheckpoint(model, made, hidden)
            if of_text is not None:
                as_first = {**first.config, "tie_word_embeddings": model.roles.tied}
                renamed.roles = roles_of(as_first, _headers(renamed))
        _refuse_other_layouts(first, settled[reference])
    return settled


def _headers(model: Checkpoint) -> Tensors:
    return {name: (info.shape, info.dtype) for name, info in model.tensors.items()}


def _refuse_other_layouts(first: Checkpoint, model: Checkpoint) -> None:
    """Raises CheckpointError where both have a parameter that is no range of the other's."""
    lacking = [name for name in first.tensors if name not in model]
    others = (
        {model.roles[n].canonical: n for n in model.tensors if n not in first} if lacking else {}
    )
    for name in lacking:
        stored = others.get(first.roles[name].canonical)
        if stored is not None and model.roles[stored].layout != first.roles[name].layout:
            raise CheckpointError(
                f"layout of {model.path}: expected {name} as in {first.path}, got {stored}, "
                "which holds the same parameters in another layout. Save both models by one "
                "release of transformers, in the same format."
            )

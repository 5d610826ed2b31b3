"""Which tied weights of the models of a merge are one, by their values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from magic_fast.checkpoint import Checkpoint
from magic_fast.engine.sources.tied import TiedCheckpoint, same_values

_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Tied:
    """The models of a merge, in which the same weights are tied.

    Attributes:
        models: reference → checkpoint.
        untied: whether weights that a configuration ties are apart in the result.
        warnings: what the user should know of it.
    """

    models: dict[str, Checkpoint]
    untied: bool = False
    warnings: list[str] = field(default_factory=list)


def settle_ties(models: Mapping[str, Checkpoint], donor: str) -> Tied:
    """Ties of words are honoured by value: what is equal is merged once, under the name of its
    source; where some model has a head of its own, or the donor's configuration, which the result
    takes, does not tie the two, they stand apart in all of them.

    Only models that store both tensors of a tie that some configuration asks for are read.
    """
    hidden: dict[str, dict[str, str]] = {name: {} for name in models}
    shown: dict[str, dict[str, str]] = {name: {} for name in models}
    ties = {tie: None for model in models.values() for tie in model.roles.ties.items()}
    names = {m: _canonical(model, ties) for m, model in models.items()}
    warnings = []
    for tied, source in ties:
        both = [m for m, known in names.items() if tied in known and source in known]
        alone = [m for m, known in names.items() if tied not in known and source in known]
        asked = any(models[m].roles.tied for m in (*both, *alone))
        if not both or not asked:
            continue
        apart = [
            m for m in both
            if not same_values(models[m], names[m][tied], models[m], names[m][source])
        ]  # fmt: skip
        if not apart and models[donor].roles.tied:
            for m in both:
                hidden[m][names[m][tied]] = names[m][source]
            continue
        name = names[(apart or both)[0]][tied]
        for m in alone:
            if models[m].roles.tied:
                shown[m][name] = names[m][source]
        if not apart:
            continue
        warnings.append(
            f"{name} of {apart[0]} has other values than {names[apart[0]][source]}, to which a "
            "configuration ties it: the result stores both, and its configuration unties them."
        )
    settled = {
        m: TiedCheckpoint(model, hidden[m], shown[m]) if hidden[m] or shown[m] else model
        for m, model in models.items()
    }
    return Tied(settled, bool(warnings), warnings)


def _canonical(model: Checkpoint, ties: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Canonical → stored name of the tensors that may be tied; those of layers only where a tie is
    to one of a layer."""
    inside = any(_LAYER.search(name) for tie in ties for name in tie)
    return {
        model.roles[name].canonical: name
        for name in model.tensors
        if inside or not _LAYER.search(name)
    }

"""Models in memory by the names of the first of them, and what their names tell."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from magic_fast.models import Kind, roles_of
from magic_fast.models.matching import common_prefix

_LOG = logging.getLogger("magic_fast")

BUFFERS = (Kind.COUNTER, Kind.DERIVED, Kind.BUFFER)


def kind_of(name: str, x: Tensor) -> Kind | None:
    """What a tensor is by its name; None for weights and biases, which are not looked at."""
    if name.endswith((".weight", ".bias")) or not name:
        return None
    return roles_of({}, {name: (tuple(x.shape), "F32" if x.is_floating_point() else "I64")})[
        name
    ].kind


def renamed(
    models: Sequence[tuple[str, Mapping[str, Tensor]]],
) -> list[tuple[str, Mapping[str, Tensor]]]:
    """The models in the names of the first one, where wrappers (``module.``, ``_orig_mod.``) or one
    prefix make the difference. Other prefixes than wrappers' are told."""
    first, wanted = models[0]
    found = [models[0]]
    for what, model in models[1:]:
        if not wanted.keys() <= model.keys() and len(model) == len(wanted):
            plain = {_unwrapped(name): name for name in wanted}
            names = {name: plain.get(_unwrapped(name)) for name in model}
            prefixes = common_prefix(wanted, model)
            if None in names.values() and prefixes is not None:
                here, there = prefixes
                names = {n: here + n.removeprefix(there) for n in model}
                _LOG.warning(
                    "%s: its tensors go by the names of %s: '%s' is '%s' there.",
                    what, first, *next(iter(names.items())),
                )  # fmt: skip
            if set(names.values()) == set(wanted):
                model = {own: model[name] for name, own in names.items() if own is not None}
        found.append((what, model))
    return found


def _unwrapped(name: str) -> str:
    """A name without the parts of DistributedDataParallel's and torch.compile's wrappers."""
    name = name.removeprefix("module.")
    return ".".join(part for part in name.split(".") if part != "_orig_mod").removeprefix("module.")


def with_buffers(
    models: Sequence[tuple[str, Mapping[str, Tensor]]],
) -> list[tuple[str, Mapping[str, Tensor]]]:
    """The models with the buffers of the first one where they lack them, and without those that it
    lacks: buffers are derived or counted, and files need not have them."""
    first, wanted = models[0]
    found = [models[0]]
    for what, model in models[1:]:
        if wanted.keys() != model.keys():
            lacking = {n: x for n, x in wanted.items() if n not in model and _is_buffer(n, x)}
            own = {n: x for n, x in model.items() if n in wanted or not _is_buffer(n, x)}
            if lacking:
                _LOG.warning(
                    "%s has no '%s'%s: it stays as in %s", what, next(iter(lacking)),
                    f" (and {len(lacking) - 1} more buffers)" if len(lacking) > 1 else "", first,
                )  # fmt: skip
            model = own | lacking
        found.append((what, model))
    return found


def _is_buffer(name: str, x: Tensor) -> bool:
    return kind_of(name, x) in BUFFERS

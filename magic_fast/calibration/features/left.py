"""How much of a model a calibration in feature space leaves as it is, and why."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from torch import nn

from magic_fast.calibration.features.groups import Group

_LOG = logging.getLogger("magic_fast")

#: The share of a model's parameters that may be left without a warning.
UNREMARKABLE = 0.1


def parameters_of(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name → (a number that tied names share, shape) of the floating parameters.

    To be asked before anything stands in for them: weights that come and go are tied no more.
    """
    found, numbers = {}, dict[int, int]()
    for name, own in model.named_parameters(remove_duplicate=False):
        if own.is_floating_point():
            found[name] = numbers.setdefault(id(own), len(numbers)), tuple(own.shape)
    return found


def shares_left(
    parameters: Mapping[str, tuple[int, tuple[int, ...]]],
    groups: Sequence[Group],
    unmapped: Mapping[str, str],
) -> dict[str, float]:
    """Reason → share of the model's floating parameters that are left for it, the largest first;
    together the whole share that is left. Tied parameters count once.

    Args:
        parameters: as of :func:`parameters_of`.
        groups: settled; those with a note are left.
        unmapped: parameter → why it belongs to no group.
    """
    total = sum(dict(map(_size, parameters.values())).values())
    found: dict[str, int] = {}
    seen: set[tuple[int, str]] = set()  # rows of one parameter may belong to several sites
    for group in groups:
        for part in (p for site in group.sites for p in site.parts if p.name in parameters):
            number, shape = parameters[part.name]
            key = (number, str(part.rows))
            if key in seen:
                continue
            seen.add(key)
            if part.rows is not None:
                shape = (len(range(shape[0])[part.rows]), *shape[1:])
            if group.note:
                found[group.note] = found.get(group.note, 0) + math.prod(shape)
    mapped = {number for number, _ in seen}
    for name, reason in unmapped.items():
        number, shape = parameters[name]
        if number not in mapped:
            mapped.add(number)
            found[reason] = found.get(reason, 0) + math.prod(shape)
    return {r: n / total for r, n in sorted(found.items(), key=lambda x: (-x[1], x[0])) if n}


def _size(parameter: tuple[int, tuple[int, ...]]) -> tuple[int, int]:
    return parameter[0], math.prod(parameter[1])


def warnings_of(left: Mapping[str, float]) -> list[str]:
    """What a user should know of :func:`shares_left`, which is logged too: nothing up to 10 %."""
    whole = sum(left.values())
    if whole <= UNREMARKABLE:
        return []
    reasons = "; ".join(f"{share:.1%}: {reason}" for reason, share in left.items())
    text = (
        f"{whole:.0%} of the model's parameters are not calibrated in feature space ({reasons}). "
        "The report's layers have the reason of each"
    )
    _LOG.warning("%s", text)
    return [text]

"""Which tensors are calibrated, and along which axes their rows lie."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from magic_fast.errors import InputError
from magic_fast.models import MAPS, Kind, Role, roles_of

_LOG = logging.getLogger("magic_fast")
#: Weights of maps but heads, whose rows are words or classes and no units of a layer.
_WEIGHTS = MAPS - {Kind.HEAD, Kind.CLASSIFIER}


def is_calibratable_magic(name: str, shape: Sequence[int]) -> bool:
    """The authors' rule: any name with "conv", else 2-D with "weight" and without the substring
    "ln"."""
    if "conv" in name:
        return len(shape) >= 1
    return "weight" in name and "ln" not in name and len(shape) == 2


def is_calibratable_general(name: str, shape: Sequence[int], role: Role | None = None) -> bool:
    """Every weight of a linear map or convolution that has two or more dimensions, but no head; a
    bare tensor ('') of two or more. Of a parameter of which nothing tells whether it is such a
    weight it is true too: its rows are asked for next, and that is refused. Without ``role`` its
    header tells.

    >>> is_calibratable_general("model.layers.0.mlp.up_proj.weight", (8, 4))
    True
    >>> is_calibratable_general("model.embed_tokens.weight", (8, 4))
    False
    """
    if len(shape) < 2 or not name:
        return len(shape) >= 2
    role = role or roles_of({}, {name: (tuple(shape), "F32")})[name]
    return role.units != () and (role.kind in _WEIGHTS or role.kind is Kind.PARAMETER)


@dataclass(frozen=True)
class TensorFilter:
    """Tensor selection by regular expressions (``re.search``) on top of the general rule.

    A name that matches any of ``exclude`` is out; else one that matches any of ``include`` is in,
    whatever the general rule says of embeddings and heads; with no ``include`` the general rule
    decides.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as e:
                raise InputError(
                    f"pattern {pattern!r} of calibration tensors: expected a regular "
                    "expression, got an "
                    f"error: {e}. Escape special characters with a backslash."
                ) from None

    def __call__(self, name: str, shape: Sequence[int], role: Role | None = None) -> bool:
        if any(re.search(p, name) for p in self.exclude):
            return False
        if self.include:
            return len(shape) >= 1 and any(re.search(p, name) for p in self.include)
        return is_calibratable_general(name, shape, role)


def say_left(tensors: str | TensorFilter, roles: Mapping[str, Role]) -> None:
    """Names in the log what the general rule leaves because a module of one's own has it as a bare
    parameter, which may be a weight or not."""
    if tensors != "general":
        return
    bare = [n for n, r in roles.items() if r.kind is Kind.PARAMETER and r.units == ()]
    if bare:
        _LOG.warning(
            "parameters that no layer has, %d of them (%s%s), are not calibrated: nothing says "
            "that they are weights of linear maps. A TensorFilter that includes them, and their "
            "row_axis, do",
            len(bare), ", ".join(bare[:3]), ", …" if len(bare) > 3 else "",
        )  # fmt: skip


def row_axes(name: str, role: Role | None) -> tuple[int, ...]:
    """Axes of the output units; the first of a tensor without such units, and of one that comes
    without a model.

    Raises:
        InputError: they are not known.
    """
    return (0,) if role is None else role.unit_axes(name) or (0,)

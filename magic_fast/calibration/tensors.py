"""Which tensors are calibrated, and along which axes their rows lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from magic_fast.errors import InputError
from magic_fast.models import Kind, Role, roles_of

_HEADS = (Kind.HEAD, Kind.CLASSIFIER)  # their rows are words or classes, no units of a layer


def is_calibratable_magic(name: str, shape: Sequence[int]) -> bool:
    """The authors' rule: any name with "conv", else 2-D with "weight" and without the substring
    "ln"."""
    if "conv" in name:
        return len(shape) >= 1
    return "weight" in name and "ln" not in name and len(shape) == 2


def is_calibratable_general(name: str, shape: Sequence[int], role: Role | None = None) -> bool:
    """Every tensor of two or more dimensions that has output units, but no head; a bare tensor ('')
    of two or more. Without ``role`` its header tells.

    >>> is_calibratable_general("model.layers.0.mlp.up_proj.weight", (8, 4))
    True
    >>> is_calibratable_general("model.embed_tokens.weight", (8, 4))
    False
    """
    if len(shape) < 2 or not name:
        return len(shape) >= 2
    role = role or roles_of({}, {name: (tuple(shape), "F32")})[name]
    return role.units != () and role.kind not in _HEADS


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


def row_axes(name: str, role: Role | None) -> tuple[int, ...]:
    """Axes of the output units; the first of a tensor without such units, and of one that comes
    without a model.

    Raises:
        InputError: they are not known.
    """
    return (0,) if role is None else role.unit_axes(name) or (0,)

"""Tied weights stored once or apart, whatever the files do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from magic_fast.checkpoint import Checkpoint

if TYPE_CHECKING:
    from typing_extensions import Buffer


class TiedCheckpoint(Checkpoint):
    """A checkpoint in which some tensors that have the values of another one are left out, or stand
    by themselves.

    Args:
        own: the checkpoint.
        hidden: stored name → the stored name whose values it has: no tensor any more, only another
            name of that one.
        shown: name → the stored name whose values it has: a tensor of its own.
    """

    def __init__(
        self, own: Checkpoint, hidden: Mapping[str, str], shown: Mapping[str, str]
    ) -> None:
        vars(self).update(vars(own))
        for known in ("roles", "quantisation"):  # of other names
            vars(self).pop(known, None)
        self._own = own
        self._hidden, self._shown = dict(hidden), dict(shown)
        self._stored = {n: info for n, info in own.tensors.items() if n not in hidden}
        for name, source in shown.items():
            self._stored[name] = replace(own.resolve(source), name=name)
        self.tensors = MappingProxyType(self._stored)
        aliases = {**own.aliases, **hidden}
        self.aliases = MappingProxyType({n: s for n, s in aliases.items() if n not in shown})

    def read_into(
        self, name: str, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """As of `Checkpoint`."""
        return self._own.read_into(self._shown.get(name, name), buffer, start, nbytes)

    def stored_dtype(self, name: str) -> str:
        """As of `Checkpoint`."""
        return self._own.stored_dtype(self._shown.get(name, name))

    def close(self) -> None:
        """Close the files of the checkpoint itself."""
        self._own.close()

    def opener(self) -> Callable[[], Checkpoint]:
        """What opens it again, in another process too."""
        return partial(_open_tied, self._own.opener(), self._hidden, self._shown)


def _open_tied(
    own: Callable[[], Checkpoint], hidden: Mapping[str, str], shown: Mapping[str, str]
) -> Checkpoint:
    return TiedCheckpoint(own(), hidden, shown)


_BLOCK = 8 << 20  # bytes that are compared at a time


def same_values(model: Checkpoint, a: str, other: Checkpoint, b: str) -> bool:
    """Whether two stored tensors have the same bytes; they are read where their dtype and shape
    agree."""
    first, second = model.resolve(a), other.resolve(b)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for start in range(0, first.nbytes, _BLOCK):
        count = min(_BLOCK, first.nbytes - start)
        one, two = bytearray(count), bytearray(count)
        model.read_into(a, one, start, count)
        other.read_into(b, two, start, count)
        if one != two:
            return False
    return True

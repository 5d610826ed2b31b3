"""A checkpoint in the layout of another one: other names, experts stacked or single."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

from magic_fast.checkpoint import Checkpoint, TensorInfo
from magic_fast.models.matching import Made

if TYPE_CHECKING:
    from typing_extensions import Buffer


class RenamedCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors are read under other names, as ranges of stored ones or as
    several of them joined. Nothing is copied.

    Args:
        own: the checkpoint.
        made: new name → where it comes from. What is used here has its own name no more.
        hidden: tensors that are not there.
    """

    def __init__(
        self, own: Checkpoint, made: Mapping[str, Made], hidden: Collection[str] = ()
    ) -> None:
        vars(self).update(vars(own))
        vars(self).pop("roles", None)  # of other names
        self._own = own
        self._made = dict(made)
        self._hidden = hidden
        used = {*hidden, *(piece.name for one in made.values() for piece in one.pieces)}
        self._stored = {name: info for name, info in own.tensors.items() if name not in used}
        self._ends: dict[str, list[int]] = {}
        for name, one in made.items():
            self._stored[name] = self._info(name, one)
        self.tensors = MappingProxyType(self._stored)
        whole = {one.pieces[0].name: name for name, one in made.items() if len(one.pieces) == 1}
        self.aliases = MappingProxyType({
            tied: whole.get(source, source)
            for tied, source in own.aliases.items()
            if tied not in self._stored and whole.get(source, source) in self._stored
        })  # fmt: skip

    def _info(self, name: str, one: Made) -> TensorInfo:
        first = self._own.resolve(one.pieces[0].name)
        size = first.nbytes // max(1, prod(first.shape))
        self._ends[name] = list(accumulate((p.stop - p.start) * size for p in one.pieces))
        offset = first.offset + one.pieces[0].start * size
        nbytes = self._ends[name][-1]
        return replace(first, name=name, shape=one.shape, offset=offset, nbytes=nbytes)

    def read_into(
        self, name: str, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """As of `Checkpoint`, put together where it is."""
        info = self.resolve(name)
        one = self._made.get(info.name)
        if one is None:
            return self._own.read_into(info.name, buffer, start, nbytes)
        count = info.nbytes - start if nbytes is None else nbytes
        info.stop_of(start, count)
        view = memoryview(buffer).cast("B")
        ends = self._ends[info.name]
        size = info.nbytes // max(1, prod(info.shape))
        done = 0
        while done < count:
            at = start + done
            index = bisect_right(ends, at)
            piece = one.pieces[index]
            skip = at - (ends[index - 1] if index else 0)
            length = min(count - done, ends[index] - at)
            self._own.read_into(
                piece.name, view[done : done + length], piece.start * size + skip, length
            )
            done += length
        return count

    def stored_dtype(self, name: str) -> str:
        """As of `Checkpoint`."""
        name = self.resolve(name).name
        one = self._made.get(name)
        return self._own.stored_dtype(name if one is None else one.pieces[0].name)

    def close(self) -> None:
        """Close the files of the checkpoint itself."""
        self._own.close()

    def opener(self) -> Callable[[], Checkpoint]:
        """What opens it again, in another process too."""
        return partial(_open_renamed, self._own.opener(), self._made, self._hidden)


def _open_renamed(
    own: Callable[[], Checkpoint], made: Mapping[str, Made], hidden: Collection[str]
) -> Checkpoint:
    return RenamedCheckpoint(own(), made, hidden)

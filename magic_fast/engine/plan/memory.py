"""Blocks of memory that are taken once and used again for every unit of work."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

from magic_fast.errors import InternalError

_ALIGNMENT = 64  # of every array in a slot: a cache line, and any element size
_HUGE_PAGE = 2 << 20

DEFAULT_MEMORY = 128 << 20
SLOTS = 4  # one being read, one merged, one written, one to smooth their differences
LEAST_SLOT = 1 << 20


def slot_bytes(memory: int) -> int:
    """Size of a slot where ``memory`` bytes of buffers are allowed."""
    return max(memory // SLOTS, LEAST_SLOT)


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Slot:
    """One block: arrays are taken from it one behind the other, then all given back at once.

    Anonymous memory on huge pages where the system has them: first touch costs a third, and a
    merge would otherwise spend longer in page faults than in arithmetic.
    """

    def __init__(self, nbytes: int) -> None:
        size = -(-max(nbytes, 1) // _HUGE_PAGE) * _HUGE_PAGE
        # private: the default is shared memory, which gets no huge pages
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._used = 0

    @property
    def size(self) -> int:
        return len(self._view)

    def take(self, nbytes: int) -> tuple[int, memoryview]:
        """Address and view of the next ``nbytes`` bytes."""
        start = self._used
        if start + nbytes > self.size:
            raise InternalError(
                f"Slot too small: expected {start + nbytes} bytes, got {self.size}. Please "
                "report this."
            )
        self._used = start + aligned(nbytes)
        return self._address + start, self._view[start : start + nbytes]

    def reset(self) -> None:
        """Gives all arrays back. Nobody may use them any more."""
        self._used = 0

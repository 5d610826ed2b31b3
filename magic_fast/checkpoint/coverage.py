"""Which bytes of a range have been written, so that a result with a gap is never called whole."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Coverage:
    """A set of byte ranges [start, stop), merged as they touch. Not locked.

    >>> done = Coverage()
    >>> done.add(4, 8)
    >>> done.add(0, 2)
    >>> done.missing(8)
    [(2, 4)]
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Mark [start, stop)."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)  # the first range that ends at or after start
        last = bisect_right(self._starts, stop)  # past the last range that begins at or before stop
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def missing(self, stop: int) -> list[tuple[int, int]]:
        """The ranges within [0, stop) that were never marked."""
        gaps: list[tuple[int, int]] = []
        position = 0
        for begin, end in zip(self._starts, self._stops, strict=True):
            if begin >= stop:
                break
            if begin > position:
                gaps.append((position, begin))
            position = max(position, end)
        if position < stop:
            gaps.append((position, stop))
        return gaps

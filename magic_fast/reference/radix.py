"""The k-th largest magnitude of data that is read several times, by counting digits."""

from __future__ import annotations

import torch
from torch import Tensor

_DIGIT_BITS = 16


class RadixSelect:
    """The bit pattern of the ``rank``-th largest magnitude (from 1), by digits; feed every value
    once a pass."""

    def __init__(self, rank: int, bits: int) -> None:
        self.rank = rank  # among the values that share the prefix
        self.shift = bits
        self.prefix = 0
        self._counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)

    @property
    def done(self) -> bool:
        return self.shift == 0

    def add(self, pattern: Tensor) -> None:
        """Counts the next digit of the patterns that share the prefix found so far."""
        flat = pattern.flatten()
        flat = flat[(flat >> self.shift) == self.prefix] if self.prefix or self.shift < 63 else flat
        digit = (flat >> (self.shift - _DIGIT_BITS)) & ((1 << _DIGIT_BITS) - 1)
        self._counts += torch.bincount(digit.to(torch.int64), minlength=1 << _DIGIT_BITS).cpu()

    def next_digit(self) -> None:
        """Ends a pass: fixes one more digit."""
        from_top = self._counts.flip(0).cumsum(0)
        place = int((from_top >= self.rank).nonzero()[0])
        digit = (1 << _DIGIT_BITS) - 1 - place
        if place:
            self.rank -= int(from_top[place - 1])
        self.prefix = (self.prefix << _DIGIT_BITS) | digit
        self.shift -= _DIGIT_BITS
        self._counts.zero_()

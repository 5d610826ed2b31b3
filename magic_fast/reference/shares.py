"""From sums over a tensor to numbers of its experts: factors of an alignment, weights by energy,
factors of what one expert alone holds (docs/methods.md).

Plain Python, without torch: every backend that has the sums finishes here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from magic_fast.recipe import Alone


def single(x: float) -> float:
    """``x`` rounded to float32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def aligned(factors: Sequence[float], lengths: Sequence[float]) -> tuple[float, ...]:
    """Each factor × the smallest length other than 0 ÷ its own; as it was where that is 1.

    >>> aligned([1.0, 1.0, 1.0], [2.0, 4.0, 0.0])
    (1.0, 0.5, 1.0)
    """
    shortest = min((n for n in lengths if n > 0), default=0.0)
    return tuple(
        f if n in (0.0, shortest) else f * shortest / n
        for f, n in zip(factors, lengths, strict=True)
    )


def energy_weights(means: Sequence[float], least: float) -> tuple[float, ...]:
    """Mean squares as shares of their sum; equal ones where there is nothing to share, or less
    than ``least``.

    >>> energy_weights([1.0, 3.0], 0.0)
    (0.25, 0.75)
    """
    total = math.fsum(means)
    if total == 0 or total < least:
        return (1.0 / len(means),) * len(means)
    return tuple(x / total for x in means)


def alone_factor(rule: Alone, unique: int, shared: int) -> float:
    """1 + r·clamp(shared ÷ max(unique, ε), 0, alpha).

    >>> alone_factor(Alone(0.5, 0.8, 1e-5), 2, 1)
    1.25
    """
    ratio = shared / max(unique, rule.epsilon or 1.0)
    return 1.0 + rule.r * min(max(ratio, 0.0), rule.alpha)

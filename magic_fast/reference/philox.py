"""Philox 4x32-10 (Salmon et al., 2011), the counter-based generator behind random masks, in plain
PyTorch.

Element ``i`` of a tensor takes word ``i mod 4`` of counter ``i div 4``, so a mask depends on
nothing but the seed, the tensor's name, the expert's index and the element's index
(docs/methods.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_GOLDEN = 0x9E3779B97F4A7C15
_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_CHUNK = 1 << 20  # counters at a time: bounds the int64 temporaries to some tens of MB


def philox_words(counter: Tensor, stream: int, seed: int) -> Tensor:
    """The four 32-bit words of each counter.

    Args:
        counter: int64 [n], the low 64 bits of the counter.
        stream: the high 64 bits of the counter.
        seed: 64-bit key.

    Returns:
        int64 [n, 4], each in [0, 2³²).

    >>> [hex(w) for w in philox_words(torch.zeros(1, dtype=torch.int64), 0, 0)[0].tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1 = counter & _MASK_32, (counter >> 32) & _MASK_32
    c2 = torch.full_like(counter, stream & _MASK_32)
    c3 = torch.full_like(counter, (stream >> 32) & _MASK_32)
    k0, k1 = seed & _MASK_32, (seed >> 32) & _MASK_32
    for _ in range(10):
        # int64 products wrap mod 2⁶⁴, so the masked shift is the true high word
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        hi0, hi1 = (p0 >> 32) & _MASK_32, (p1 >> 32) & _MASK_32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, p1 & _MASK_32, hi0 ^ c3 ^ k1, p0 & _MASK_32
        k0, k1 = (k0 + _WEYL_0) & _MASK_32, (k1 + _WEYL_1) & _MASK_32
    return torch.stack((c0, c1, c2, c3), dim=1)


def expert_stream(stream: int, expert: int) -> int:
    """High counter half of one expert: the tensor's stream plus expert · 0x9E3779B97F4A7C15 (mod
    2⁶⁴)."""
    return (stream + expert * _GOLDEN) & _MASK_64


def random_keep(
    numel: int,
    probability: float | Tensor,
    *,
    seed: int,
    stream: int,
    expert: int,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Keep mask of ``numel`` elements from flat index ``offset`` on: word < ⌊p·2³²⌋.

    Args:
        numel: how many elements.
        probability: p, one number or float64 [numel]; p = 1 keeps everything.
        seed, stream, expert: what the mask depends on, besides the element's index.
        offset: flat index of the first element inside the whole tensor.

    Returns:
        bool [numel].
    """
    high = expert_stream(stream, expert)
    seed &= _MASK_64
    keep = torch.empty(numel, dtype=torch.bool, device=device)
    whole = None if isinstance(probability, Tensor) else math.floor(probability * 2.0**32)
    start = 0
    while start < numel:
        first = (offset + start) // 4
        stop = min(numel, (first + _CHUNK) * 4 - offset)
        counter = torch.arange(first, (offset + stop + 3) // 4, dtype=torch.int64, device=device)
        words = philox_words(counter, high, seed).flatten()
        words = words[offset + start - 4 * first :][: stop - start]
        if whole is not None:
            keep[start:stop] = words < whole
        else:
            assert isinstance(probability, Tensor)
            keep[start:stop] = words < torch.floor(probability[start:stop] * 2.0**32).to(
                torch.int64
            )
        start = stop
    return keep

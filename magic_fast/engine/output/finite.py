"""NaN and infinity in stored bytes."""

from __future__ import annotations

from typing import Any

_BLOCK_BYTES = 1 << 20  # what is made of a block stays in the caches
# dtype → (numpy word of the same width, bits that are all set in infinities and NaNs)
_EXPONENTS = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}


def nonfinite(data: Any, dtype: str) -> tuple[int, int | None]:
    """How many elements are NaN or infinite, and which is the first (None: none is).

    Args:
        data: bytes of whole elements, little-endian.
        dtype: safetensors' name; of others than floats nothing is infinite.

    >>> nonfinite(bytes([0, 0x7F]) + bytes([0x80, 0x7F]), "BF16")
    (1, 1)
    """
    if dtype not in _EXPONENTS:
        return 0, None
    import numpy as np

    word, mask = _EXPONENTS[dtype]
    bits = np.frombuffer(data, dtype=word)
    count, first = 0, None
    step = _BLOCK_BYTES // bits.itemsize
    for start in range(0, len(bits), step):
        block = bits[start : start + step]
        hits = (block & block.dtype.type(mask)) == mask
        found = int(np.count_nonzero(hits))
        if found and first is None:
            first = start + int(hits.argmax())
        count += found
    return count, first

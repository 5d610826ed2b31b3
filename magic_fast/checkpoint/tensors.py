"""What a stored tensor is: dtypes of the safetensors format, sizes, places."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from magic_fast.errors import InputError, InternalError

from .messages import is_unicode, shown

METADATA_KEY = "__metadata__"  # the one key of a header that is no tensor
MAX_DIMENSIONS = 64
LARGEST = 2**63 - 1

#: Bits of one element for every dtype name of the format.
DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a dense tensor; None where its elements (4 and 6 bits) do not fill whole bytes.

    >>> tensor_nbytes("BF16", (3, 4))
    24
    """
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    return None if bits % 8 else bits // 8


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is, not yet where.

    Attributes:
        name: key in the checkpoint.
        dtype: safetensors' name.
        shape: sizes, outermost first.
        nbytes: size of the data in bytes, computed.

    Raises:
        InputError: unknown dtype, negative size, or a name that the format cannot hold.

    >>> TensorSpec("w", "F32", (2, 3)).nbytes
    24
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise InputError(
                f"Unknown dtype for tensor {shown(self.name)}: expected one of "
                f"{', '.join(DTYPE_BITS)}, got {self.dtype!r}. Use the dtype names of safetensors."
            )
        if len(self.shape) > MAX_DIMENSIONS or not all(
            type(n) is int and n >= 0 for n in self.shape
        ):
            raise InputError(
                f"Bad shape for tensor {shown(self.name)}: expected at most {MAX_DIMENSIONS} "
                f"non-negative integers, got {shown(self.shape)}. Correct the shape."
            )
        size = tensor_nbytes(self.dtype, self.shape)
        if size is None or size > LARGEST:
            raise InputError(
                f"Bad size for tensor {shown(self.name)}: expected whole bytes below 2^63, got "
                f"shape {shown(self.shape)} of {self.dtype}. Correct the shape."
            )
        if self.name == METADATA_KEY or not is_unicode(self.name):
            raise InputError(
                f"Bad name for tensor {shown(self.name)}: expected valid Unicode other than "
                f"{METADATA_KEY!r}, got {shown(self.name)}. Rename the tensor."
            )
        object.__setattr__(self, "nbytes", size)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor and where its bytes lie.

    Attributes:
        name: key in the checkpoint.
        dtype: safetensors' name: ``BF16``, ``F16``, ``F32``, ``F64``, ``I64``, ``U8``, ``BOOL``, …
        shape: sizes, outermost first; ``()`` for a scalar.
        path: the file: as it can be opened (inputs), or its name within the output folder (plans).
        offset: absolute position of the first byte in the file.
        nbytes: size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int

    def stop_of(self, start: int, nbytes: int) -> int:
        """The end of a range of bytes of this tensor, checked to lie within it.

        Raises:
            InternalError: it does not.
        """
        if not 0 <= start <= start + nbytes <= self.nbytes:
            raise InternalError(
                f"Range outside the tensor for {shown(self.name)}: expected bytes within 0 to "
                f"{self.nbytes}, got {start} to {start + nbytes}. Please report this."
            )
        return start + nbytes

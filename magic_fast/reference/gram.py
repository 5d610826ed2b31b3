"""K vectors of one tensor as a Gram matrix and back: what every geometric mean is written over.

A method reads the vectors once for their inner products (float64), turns these K×K numbers into K
coefficients, and reads the vectors once more to add them up. Nothing of the tensor's size is held
but the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18  # elements of one vector at a time: its copies stay in the cache
_DEVICE_ELEMENTS = 1 << 22  # the same on a GPU: few launches


@dataclass(frozen=True)
class Vectors:
    """K vectors in each of ``rows`` rows: x_k = θ_k, or θ_k − θ_0 where there is a base.

    Attributes:
        base: [rows, cols], or None.
        experts: K of [rows, cols], each of its own dtype.
        dtype: of the elements, float32 or float64.
        moved: shape of the tensor with ``axis`` last.
        axis: the axis the vectors run along; None: one vector, the whole tensor.
    """

    base: Tensor | None
    experts: tuple[Tensor, ...]
    dtype: torch.dtype
    moved: torch.Size
    axis: int | None

    @staticmethod
    def of(
        base: Tensor | None, experts: Sequence[Tensor], dtype: torch.dtype, axis: int | None = None
    ) -> Vectors:
        """The vectors of a tensor.

        Args:
            base: what differences start from, or None.
            experts: K tensors of one shape.
            dtype: in which differences are formed.
            axis: None: the flattened tensor is one vector; −1: one per last-dimension row;
                0: one per fibre along dimension 0. A scalar is one vector.
        """
        if experts[0].dim() == 0:
            axis = None

        def view(x: Tensor) -> Tensor:
            if axis is None:
                return x.reshape(1, -1)
            moved = x.movedim(axis, -1)
            return moved.reshape(moved.shape[:-1].numel(), x.shape[axis])

        shape = experts[0].shape if axis is None else experts[0].movedim(axis, -1).shape
        views = tuple(view(e) for e in experts)
        return Vectors(None if base is None else view(base), views, dtype, shape, axis)

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        rows, cols = self.experts[0].shape
        most = _BLOCK_ELEMENTS if self.experts[0].device.type == "cpu" else _DEVICE_ELEMENTS
        width = min(max(cols, 1), most)
        height = max(1, most // width)
        for r in range(0, rows, height):
            for c in range(0, cols, width):
                yield slice(r, min(r + height, rows)), slice(c, min(c + width, cols))

    def _read(self, block: tuple[slice, slice]) -> list[Tensor]:
        found = [e[block].to(self.dtype) for e in self.experts]
        if self.base is None:
            return found
        start = self.base[block].to(self.dtype)
        return [x - start for x in found]

    def gram(self) -> Tensor:
        """⟨x_j, x_k⟩ of every row, float64 [rows, K, K], on the device of the vectors."""
        rows, k = self.experts[0].shape[0], len(self.experts)
        found = torch.zeros(rows, k, k, dtype=torch.float64, device=self.experts[0].device)
        for block in self._blocks():
            x = torch.stack(self._read(block), dim=1).double()
            found[block[0]] += x @ x.transpose(1, 2)
        return found

    def combine(self, coefficients: Tensor) -> Tensor:
        """Σ_k c_k·x_k (plus the base where there is one), in the tensor's shape and ``dtype``.

        Args:
            coefficients: [rows, K]; rounded once to ``dtype``.
        """
        weights = coefficients.to(device=self.experts[0].device, dtype=self.dtype)
        total = torch.empty(self.experts[0].shape, dtype=self.dtype, device=self.experts[0].device)
        for block in self._blocks():
            part = torch.zeros_like(total[block])
            for k, x in enumerate(self._read(block)):
                part += weights[block[0], k, None] * x
            if self.base is not None:
                part += self.base[block].to(self.dtype)
            total[block] = part
        shaped = total.reshape(self.moved)
        return shaped if self.axis is None else shaped.movedim(-1, self.axis)

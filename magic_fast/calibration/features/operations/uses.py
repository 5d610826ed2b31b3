"""Linear operations with parameters in them, and what is made of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

aten = torch.ops.aten

CASTS = {aten._to_copy, aten.to}
JOINS = {aten.cat, aten.stack}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv}
# Other operations that are linear in weight and bias together: where those are.
OTHERS: dict[Any, tuple[int, ...]] = {
    aten.convolution: (1, 2),
    aten.embedding: (0,),
    aten.mul: (0, 1),
    aten.native_layer_norm: (2, 3),
    aten.native_group_norm: (1, 2),
    aten.native_batch_norm: (1, 2),
    aten._native_batch_norm_legit: (1, 2),
    aten._native_batch_norm_legit_no_training: (1, 2),
    aten.cudnn_batch_norm: (1, 2),
    aten._fused_rms_norm: (2,),
}


@dataclass(frozen=True)
class Piece:
    """A view of a parameter: strides and offset count its elements."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def value(self, parameters: Mapping[str, Tensor], *, linear: bool = False) -> Tensor:
        own = parameters[self.name]
        return own.reshape(-1).as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Made:
    """What an operation made of pieces of parameters: linear in them, but for constants."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: int | None  # of an operation that gives several

    def value(self, parameters: Mapping[str, Tensor], *, linear: bool = False) -> Tensor:
        """With other parameters; ``linear``: in their dtype, constants taken as 0."""

        def filled(x: Any) -> Any:
            if isinstance(x, Piece | Made):
                return x.value(parameters, linear=linear)
            if isinstance(x, Tensor) and linear and self.op.overloadpacket in JOINS:
                like = next(iter(parameters.values()))
                return torch.zeros(x.shape, dtype=like.dtype, device=like.device)
            return type(x)(map(filled, x)) if type(x) in (tuple, list) else x

        if linear and self.op.overloadpacket in CASTS:
            found = filled(self.args[0])
        elif linear and self.op.overloadpacket is aten.add:  # of constants, too
            found = sum(filled(x) for x in self.args if isinstance(x, Piece | Made))
        else:
            found = self.op(*map(filled, self.args), **self.kwargs)
        return found if self.output is None else found[self.output]  # type: ignore[no-any-return]


Weight: TypeAlias = Piece | Made


def pieces(weight: Any) -> Iterator[Piece]:
    """The parts of parameters that something was made of."""
    if isinstance(weight, Piece):
        yield weight
    elif isinstance(weight, Made):
        yield from pieces(list(weight.args))
    elif isinstance(weight, tuple | list):
        for x in weight:
            yield from pieces(x)


@dataclass
class Use:
    """One operation with parameters in it.

    Attributes:
        op: one of :data:`PRODUCTS` or :data:`OTHERS`, as the overload that ran.
        args: its arguments; those made of parameters as :class:`Piece` or :class:`Made`.
        bias: what is added to it afterwards and made of parameters.
        closed: whether its result goes on without what was added, too: then that is no bias.
    """

    op: Any
    args: tuple[Any, ...]
    bias: list[Weight] = field(default_factory=list)
    closed: bool = False

    @property
    def axis(self) -> int:
        """Of its result, where the features are."""
        if self.op.overloadpacket in PRODUCTS and isinstance(self.args[-2], Piece | Made):
            return -2
        return 1 if self.op.overloadpacket not in PRODUCTS | {aten.embedding, aten.mul} else -1


@dataclass(frozen=True)
class Result:
    """A tensor that holds what an operation gave, perhaps in another shape.

    Attributes:
        biases: how many were added.
        size: features of a position.
        stride: of the features, in elements; None: not known.
    """

    use: Use
    biases: int
    size: int
    stride: int | None

    @classmethod
    def of(cls, use: Use, output: Tensor) -> Result:
        if use.op.overloadpacket in (aten.mv, aten.addmv):  # of a vector: its only axis
            return cls(use, 0, output.shape[0], output.stride(0))
        axis = use.axis if output.dim() >= (use.axis if use.axis > 0 else -use.axis) else -1
        if not output.dim():
            return cls(use, 0, 1, None)
        return cls(use, 0, output.shape[axis], output.stride(axis))

    def viewed(self, of: Tensor, result: Tensor) -> Result:
        """The same values in another tensor."""
        shared = of.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
        alike = of.shape == result.shape and of.stride() == result.stride()
        return self if shared or alike else replace(self, stride=None)

    def takes(self, values: Tensor, bias: Tensor) -> bool:
        """Whether what is added to ``values`` is a number for each of the features."""
        if self.use.closed or self.biases != len(self.use.bias) or bias.numel() != self.size:
            return False
        own = range(-values.dim(), 0)
        if self.stride is None:
            found = [d for d in own if values.shape[d] == self.size]
            if len(found) > 1 and self.size > 1:
                return False
        else:
            end = self.stride * self.size
            found = [d for d in own if self.stride <= values.stride(d) < end]
        places = {d: bias.shape[d] for d in own if -d <= bias.dim() and bias.shape[d] > 1}
        return bias.dim() <= values.dim() and places == {
            d: values.shape[d] for d in found if values.shape[d] > 1
        }

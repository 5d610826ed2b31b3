"""Where a run of a model uses parameters as linear maps, wherever its code does so.

A module's call tells what a layer receives only where the layer is called. Attentions that read
``self.qkv.weight``, stacks of experts, and projections inside a larger module show themselves in
the operations alone: a product one of whose factors is a view of a parameter. Views are known by
storage and offset; casts, joins and multiples of parameters by how they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

_VIEWS = {
    aten.t, aten.transpose, aten.permute, aten.view, aten._unsafe_view, aten.reshape, aten.select,
    aten.slice, aten.unsqueeze, aten.squeeze, aten.expand, aten.alias, aten.detach, aten.split,
    aten.split_with_sizes, aten.unbind, aten.as_strided, aten.clone, aten._to_copy, aten.to,
    aten.contiguous, aten.chunk, aten.movedim, aten.flatten, aten.unflatten, aten.lift_fresh,
    aten._reshape_alias, aten.view_as, aten.expand_as,
}  # fmt: skip
_CASTS = {aten._to_copy, aten.to}
_MULTIPLES = {aten.mul, aten.div}
_JOINS = {aten.cat, aten.stack}
_SHAPES = {  # which take no values from what they get
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like,
    aten.randn_like, aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full,
    aten.new_empty_strided, aten.is_same_size,
}  # fmt: skip
_SUMS = {aten.add, aten.add_}
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
_USES = PRODUCTS | set(OTHERS)


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
            if isinstance(x, Tensor) and linear and self.op.overloadpacket in _JOINS:
                like = next(iter(parameters.values()))
                return torch.zeros(x.shape, dtype=like.dtype, device=like.device)
            return type(x)(map(filled, x)) if type(x) in (tuple, list) else x

        if linear and self.op.overloadpacket in _CASTS:
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
        shape: of its result.
    """

    op: Any
    args: tuple[Any, ...]
    bias: list[Weight] = field(default_factory=list)
    shape: tuple[int, ...] = ()

    def takes(self, bias: Tensor) -> bool:
        """Whether what is added is a number for each of its features."""
        axis = -1
        if self.op.overloadpacket in PRODUCTS and isinstance(self.args[-2], Piece | Made):
            axis = -2
        elif self.op.overloadpacket not in PRODUCTS | {aten.embedding, aten.mul}:
            axis = 1
        return bias.numel() == self.shape[axis]


class Tracked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, ``use`` is called before every operation that is linear in one of the
    parameters.

    Args:
        parameters: name → parameter (contiguous ones are followed).
        use: gets the operation. If it returns True, parameters were written to: what was made of
            them is made again.

    Attributes:
        unknown: name → the first other operation in which a parameter was.
    """

    def __init__(self, parameters: Mapping[str, Tensor], use: Callable[[Use], bool | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._use = use
        self._own: dict[int, list[tuple[int, int, str, Tensor]]] = {}
        self._made: Any = WeakIdKeyDictionary()
        self._results: Any = WeakIdKeyDictionary()
        self.unknown: dict[str, str] = {}
        self._parameters = dict(parameters)
        for name, p in parameters.items():
            if p.numel() and p.is_contiguous() and p.device.type != "meta":
                start = int(p.storage_offset())
                key = p.untyped_storage().data_ptr()
                self._own.setdefault(key, []).append((start, start + p.numel(), name, p))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in _USES | _VIEWS and func._can_decompose():
            with self:  # in inference mode operations come whole
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        known = tuple(self._known(x) for x in args)
        if next(pieces(list(known)), None) is None or packet in _SHAPES:
            return self._followed(func, packet, args, kwargs)
        if packet in _VIEWS or self._makes(packet, args, known):
            return self._kept(func, known, args, kwargs)
        if _is_linear(packet, known) and not kwargs:
            return self._used(func, args, known)
        if packet in _SUMS:
            return self._added(func, args, known, kwargs)
        self._note(func, known)
        return func(*args, **kwargs)

    def _known(self, x: Any) -> Any:
        """An argument, what is made of parameters replaced by how."""
        if isinstance(x, Tensor):
            if (made := self._made.get(x)) is not None:
                return made
            return self._piece(x) or x
        if type(x) in (tuple, list) and any(isinstance(y, Tensor) for y in x):
            return [self._known(y) for y in x]
        return x

    def _piece(self, x: Tensor) -> Piece | None:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided:
            return None
        found = self._own.get(x.untyped_storage().data_ptr())
        for start, stop, name, parameter in found or ():
            if start <= x.storage_offset() < stop and x.dtype == parameter.dtype and x.numel():
                offset = int(x.storage_offset()) - start
                return Piece(name, tuple(x.shape), x.stride(), offset)
        return None

    @staticmethod
    def _makes(packet: Any, args: Sequence[Any], known: Sequence[Any]) -> bool:
        """Whether the result is made of parameters and constants alone, and linear in them."""
        if packet in _JOINS or packet is aten.neg:
            return True
        weights = [k for k in known if isinstance(k, Piece | Made)]
        others = [
            x
            for x, k in zip(args, known, strict=True)
            if isinstance(x, Tensor) and k is x and x.dim()
        ]
        several = packet in _MULTIPLES and (len(weights) > 1 or known[0] not in weights)
        return packet in (_MULTIPLES | {aten.add}) and not others and not several

    def _kept(self, func: Any, known: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        several = not isinstance(result, Tensor)
        for n, out in enumerate(result if several else [result]):
            if self._piece(out) is None:
                self._made[out] = Made(func, known, kwargs, n if several else None)
        return result

    def _used(self, func: Any, args: Sequence[Any], known: tuple[Any, ...]) -> Any:
        use = Use(func, known)
        if self._use(use):
            args = [
                k.value(self._parameters) if isinstance(k, Made) else x
                for x, k in zip(args, known, strict=True)
            ]
        result = func(*args)
        first = result if isinstance(result, Tensor) else result[0]
        use.shape = tuple(first.shape)
        self._results[first] = use
        return result

    def _followed(self, func: Any, packet: Any, args: Any, kwargs: Any) -> Any:
        """An operation without parameters: a view of a product is still that product."""
        result = func(*args, **kwargs)
        if packet in _VIEWS and isinstance(result, Tensor):
            use = self._results.get(args[0])
            if use is not None:
                self._results[result] = use
        return result

    def _added(self, func: Any, args: Any, known: tuple[Any, ...], kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        uses = [self._results.get(x) for x in args[:2] if isinstance(x, Tensor)]
        bias = [k for k in known[:2] if isinstance(k, Piece | Made)]
        use = next((u for u in uses if u is not None), None)
        value = next((x for x, k in zip(args, known, strict=True) if k in bias), None)
        if use and value is not None and not kwargs and use.takes(value):
            use.bias.append(bias[0])
            self._results[result] = use
        else:
            self._note(func, known)
        return result

    def _note(self, func: Any, known: tuple[Any, ...]) -> None:
        for piece in pieces(list(known)):
            self.unknown.setdefault(piece.name, str(func.overloadpacket).rpartition(".")[2])


def _is_linear(packet: Any, known: Sequence[Any]) -> bool:
    """Whether an operation is linear in the parameters that are in it, and has nothing else in
    their places."""
    weights = {n for n, x in enumerate(known) if isinstance(x, Piece | Made)}
    if packet in PRODUCTS:
        factors = weights & ({0, 1} if len(known) == 2 else {1, 2})
        return len(factors) == 1
    places = OTHERS.get(packet, ())
    if packet is aten.mul:
        return len(weights) == 1
    if not weights or not weights <= set(places) or places[0] not in weights:
        return False
    return not any(isinstance(known[n], Tensor) for n in places if n < len(known))

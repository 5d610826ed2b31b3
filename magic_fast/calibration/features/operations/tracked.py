"""Where a run of a model uses parameters as linear maps, wherever its code does so.

A module's call tells what a layer receives only where the layer is called. Attentions that read
``self.qkv.weight``, stacks of experts, and projections inside a larger module show themselves in
the operations alone: a product one of whose factors is a view of a parameter. Views are known by
storage and offset; casts, joins and multiples of parameters by how they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from magic_fast.calibration.features.operations.uses import (
    JOINS,
    OTHERS,
    PRODUCTS,
    Made,
    Piece,
    Result,
    Use,
    aten,
    pieces,
)

_VIEWS = {
    aten.t, aten.transpose, aten.permute, aten.view, aten._unsafe_view, aten.reshape, aten.select,
    aten.slice, aten.unsqueeze, aten.squeeze, aten.expand, aten.alias, aten.detach, aten.split,
    aten.split_with_sizes, aten.unbind, aten.as_strided, aten.clone, aten._to_copy, aten.to,
    aten.contiguous, aten.chunk, aten.movedim, aten.flatten, aten.unflatten, aten.lift_fresh,
    aten._reshape_alias, aten.view_as, aten.expand_as,
}  # fmt: skip
_MULTIPLES = {aten.mul, aten.div}
_SHAPES = {  # which take no values from what they get
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like,
    aten.randn_like, aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full,
    aten.new_empty_strided, aten.is_same_size,
}  # fmt: skip
_SUMS = {aten.add, aten.add_}
_USES = PRODUCTS | set(OTHERS)


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
            return self._added(func, packet, args, known, kwargs)
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
        if packet in JOINS or packet is aten.neg:
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
        use = Use(func, self._with_bias(func, args, known))
        if self._use(use):
            args = [
                k.value(self._parameters) if isinstance(k, Made) else x
                for x, k in zip(args, known, strict=True)
            ]
        result = func(*args)
        first = result if isinstance(result, Tensor) else result[0]
        self._results[first] = Result.of(use, first)
        return result

    def _with_bias(self, func: Any, args: Sequence[Any], known: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments; what a product adds only if it is a number for each feature."""
        if len(known) != 3 or func.overloadpacket not in PRODUCTS:
            return known
        first, use = known[0], Use(func, known)
        if not isinstance(first, Piece | Made):
            return known
        a, b = args[1], args[2]
        like = torch.empty(
            (*a.shape[:-1], b.shape[-1]) if b.dim() > 1 else a.shape[:1], device="meta"
        )
        if Result.of(use, like).takes(like, args[0]) or _of_a_batch(args[0], like, use):
            return known
        self._note(func, (first,))
        return args[0], *known[1:]

    def _followed(self, func: Any, packet: Any, args: Any, kwargs: Any) -> Any:
        """An operation without parameters: a view of a product is still that product."""
        result = func(*args, **kwargs)
        if packet in _VIEWS and isinstance(result, Tensor):
            held = self._results.get(args[0])
            if held is not None and result.numel() == args[0].numel():
                self._results[result] = held.viewed(args[0], result)
        elif func._schema.is_mutable:
            for x in args:
                if isinstance(x, Tensor):
                    self._results.pop(x, None)
        return result

    def _added(self, func: Any, packet: Any, args: Any, known: tuple[Any, ...], kwargs: Any) -> Any:
        place = next(n for n, k in enumerate(known) if isinstance(k, Piece | Made))
        values, added = args[1 - place], args[place]
        held = self._results.get(values) if isinstance(values, Tensor) else None
        written = packet is aten.add_ and not place
        taken = held is not None and not (kwargs or written) and held.takes(values, added)
        result = func(*args, **kwargs)
        if taken:
            assert held is not None
            held.use.bias.append(known[place])
            after = replace(held, biases=held.biases + 1)
            self._results[result] = after.viewed(values, result)
            return result
        if held is not None and not held.use.closed:  # another branch of the model adds its own
            for bias in held.use.bias[held.biases :]:
                self._note(func, (bias,))
            del held.use.bias[held.biases :]
            held.use.closed = True
        self._note(func, known)
        return result

    def _note(self, func: Any, known: tuple[Any, ...]) -> None:
        for piece in pieces(list(known)):
            self.unknown.setdefault(piece.name, str(func.overloadpacket).rpartition(".")[2])


def _of_a_batch(added: Tensor, like: Tensor, use: Use) -> bool:
    """Whether a product of a batch adds a number for each feature of each."""
    axis = use.axis % 3
    rest = 3 - axis
    return (
        like.dim() == added.dim() == 3
        and added.shape[axis] == like.shape[axis]
        and added.shape[rest] == 1
    )


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
